"""Our rewards inside other trainers. Each adapter is called as its trainer calls it.

The calls are recorded from OpenRLHF 0.11.2, verl 0.9.1, verifiers 0.4.0 and TRL 1.16. Where one of the first three is
installed, its own code makes the call as well (`test_real_...`).
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from rlme.adapters import client, openrlhf, verifiers, verl
from rlme.adapters.client import MissingReward, RewardClient, RewardServerError
from rlme.adapters.trl import RemoteReward
from rlme.errors import InputError
from tests.test_serve import Judge, Server, reward_of, serving

QUERY = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>"
PROMPT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Judge(), token="s3cret") as running:
        yield running


@pytest.fixture(autouse=True)
def _address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLME_SERVE_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("RLME_SERVE_TOKEN", "s3cret")
    monkeypatch.setattr(openrlhf, "_client", None)
    monkeypatch.setattr(verifiers, "_client", None)
    verl._clients.clear()


def expected(completion: str, prompt: str = "Why?") -> float:
    (reward,) = reward_of(Judge()).score([prompt], [completion])
    assert reward is not None
    return reward


def test_client_batches_retries_and_names_errors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ITEMS", 7)
    texts = [f"{i}" for i in range(20)]
    results = RewardClient().score([{"prompt": "Why?", "completion": t} for t in texts])
    assert [r["reward"] for r in results] == [expected(t) for t in texts]
    assert RewardClient().score([]) == []
    with pytest.raises(RewardServerError, match="HTTP 401"):
        RewardClient(token="wrong").score([{"prompt": "", "completion": ""}])
    with pytest.raises(RewardServerError, match=r"HTTP 422.*completion"):
        RewardClient().score([{"prompt": ""}])
    with pytest.raises(RewardServerError, match="refused"):
        RewardClient("http://127.0.0.1:9", patience=0.1).score([{"prompt": "", "completion": ""}])
    with pytest.raises(RewardServerError, match="expected http"):
        RewardClient("judge:8765")
    with pytest.raises(RewardServerError, match=r"HTTP 503.*endpoint is gone"):
        RewardClient(patience=0.5).score([{"prompt": "", "completion": "stop"}])
    with pytest.raises(MissingReward, match="hash/right: timeout too late"):
        RewardClient().reward({"prompt": "", "completion": "fail"})


def test_the_client_keeps_its_token_to_itself(server: Server) -> None:
    items = [{"prompt": "Why?", "completion": "a"}]
    assert RewardClient(token="s3cret\n").score(items)[0]["reward"] == expected("a")
    for token in ("s3\ncret", "schlüssel"):
        with pytest.raises(RewardServerError, match="must consist of printable ASCII") as refused:
            RewardClient(token=token)
        assert token not in str(refused.value)
    with pytest.raises(RewardServerError, match="HTTP 401"):  # also where the server did not wait for the body
        RewardClient(token="wrong", patience=5).score([{"prompt": "Why?", "completion": "x" * (6 << 20)}])


def test_requests_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_BYTES", 1000)
    texts = [c * 400 for c in "abcde"] + ["f" * 4000]
    items = [{"prompt": "Why?", "completion": t} for t in texts]
    assert [s.stop - s.start for s in client.batches(items)] == [2, 2, 1, 1]
    assert [r["reward"] for r in RewardClient().score(items)] == [expected(t) for t in texts]
    reply = openrlhf.reward_func([PROMPT + t for t in texts], [PROMPT] * 6, [""] * 6)
    assert reply["rewards"] == [expected(t, PROMPT) for t in texts]


def test_an_unknown_answer_is_a_missing_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Judge(), reward={"answer": "gold", "mode": "rlvr"}) as rlvr:
        monkeypatch.setenv("RLME_SERVE_URL", f"http://127.0.0.1:{rlvr.port}")
        golds = [None, "", float("nan"), "5"]
        rewards = RemoteReward(answer="gold")(prompts=["a"] * 4, completions=["5", "None", "nan", "5"], gold=golds)
        assert rewards == [None, None, None, 1.0]
        for gold in (None, ""):
            with pytest.raises(MissingReward, match="no known answer"):
                asyncio.run(verl.compute_score("d", "5", gold, {"question": "Why?"}))
            body = {"query": [PROMPT + "5"], "prompts": [PROMPT], "labels": [gold]}
            assert rlvr.call("POST", "/openrlhf", body)[:2] == (503, {"detail": "no reward: no known answer"})


def test_values_of_other_libraries_and_empty_batches() -> None:
    np = pytest.importorskip("numpy")
    extra = {"question": "Why?", "n": np.int64(3), "when": datetime.date(2026, 1, 2), "many": np.arange(2)}
    scores = asyncio.run(verl.compute_score("d", "a", np.int64(4), extra, columns=("n", "when", "many")))
    assert scores["score"] == expected("a")
    assert openrlhf.reward_func([PROMPT + "a"], [PROMPT], [np.int64(1)])["rewards"] == [expected("a", PROMPT)]
    assert openrlhf.reward_func([], [], []) == {"rewards": [], "scores": [], "extra_logs": {}}
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    silent = [{"role": "assistant", "content": None}]
    rewards = RemoteReward()(prompts=["Why?"] * 3, completions=[parts, [], silent])
    assert rewards == [expected("a"), expected(""), expected("")]


@pytest.mark.parametrize(
    "ending", ["</s>", "<turn|>", "<pad>", "<|im_end|>\n<pad><pad>", "<｜end▁of▁sentence｜>", "<eos>\n", ""]
)
def test_closing_tokens_are_no_part_of_a_completion(server: Server, ending: str) -> None:
    body = {"query": [f"{PROMPT}a <b>{ending}"], "prompts": [PROMPT]}
    _, reply, _ = server.call("POST", "/openrlhf", body, Authorization="Bearer s3cret")
    assert reply["rewards"] == [expected("a <b>", PROMPT)]


def test_trl() -> None:
    metrics: dict[str, float] = {}
    chat = [{"role": "user", "content": "Why?"}]
    rewards = RemoteReward()(
        prompts=["Why?", chat, "Why?"],
        completions=["a", [{"role": "assistant", "content": "b"}], "fail"],
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
        log_metric=metrics.__setitem__,
        log_extra=lambda name, values: None,
        level=["easy"] * 3,
    )
    assert rewards == [expected("a"), expected("b"), None]
    assert metrics["reward_missing"] == pytest.approx(1 / 3)
    assert 0 < metrics["judge/hash/right/probability"] < 1


def test_trl_names_a_column_that_is_not_there() -> None:
    for options in ({"columns": ["source"]}, {"answer": "source"}):
        with pytest.raises(InputError, match=r"column 'source', which the data set does not have.*its own: level$"):
            RemoteReward(**options)(prompts=["a"], completions=["x"], level=["easy"], trainer_state=None)  # type: ignore[arg-type]


def test_trl_trains_on_it(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=2,
        max_completion_length=4, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "Why?"}] * 2)
    trainer = GRPOTrainer(str(tiny_policy_dir), reward_funcs=RemoteReward(), args=arguments, train_dataset=data)
    trainer.train()
    assert any("rewards/rlme/mean" in row for row in trainer.state.log_history)


def test_openrlhf_over_http(server: Server) -> None:
    body = {"query": [QUERY, PROMPT + "No.</s>"], "prompts": [PROMPT, PROMPT], "labels": ["4", None]}
    status, reply, _ = server.call("POST", "/openrlhf", body, Authorization="Bearer s3cret")
    assert status == 200
    assert reply["rewards"] == reply["scores"] == [expected("Because.", PROMPT), expected("No.", PROMPT)]
    assert set(reply["extra_logs"]) == {"hash/right", "hash/short"}
    assert all(len(values) == 2 for values in reply["extra_logs"].values())
    for bad in ({"query": [PROMPT + "fail"], "prompts": [PROMPT]}, {"query": ["x"], "prompts": [PROMPT]}):
        status, reply, _ = server.call("POST", "/openrlhf", bad, Authorization="Bearer s3cret")
        assert status in (503, 422) and "rewards" not in reply


def test_openrlhf_reward_file() -> None:
    reply = openrlhf.reward_func([QUERY], [PROMPT], ["4"])
    assert reply["rewards"] == reply["scores"] == [expected("Because.", PROMPT)]


def verl_call(**sample: Any) -> Any:
    """As verl's `get_custom_reward_fn` and `NaiveRewardManager.run_single` do it."""

    async def with_kwargs(raw: Any, extra: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return await raw(*args, **{**kwargs, **extra})

    assert inspect.iscoroutinefunction(verl.compute_score)
    score = functools.partial(with_kwargs, verl.compute_score, {"prompt_key": "question"})
    extra = {"num_turns": 1, "rollout_reward_scores": {}, **sample.pop("extra_info")}
    return asyncio.run(score(data_source="gsm8k", ground_truth="4", extra_info=extra, **sample))


def test_verl() -> None:
    result = verl_call(solution_str="Because.", extra_info={"question": "Why?"})
    assert result["score"] == expected("Because.") and 0 < result["hash/right"] < 1
    assert all(isinstance(v, float) and math.isfinite(v) for v in result.values())
    with pytest.raises(MissingReward):
        verl_call(solution_str="fail", extra_info={"question": "Why?"})
    with pytest.raises(KeyError, match="prompt_key"):
        verl_call(solution_str="Because.", extra_info={})


def test_verifiers() -> None:
    task = SimpleNamespace(prompt_text="Why?", answer="4")
    metrics: dict[str, float] = {}
    trace = SimpleNamespace(last_reply="Because.", record_metric=metrics.__setitem__)
    assert asyncio.run(verifiers.rlme_reward(task=task, trace=trace)) == expected("Because.")
    assert set(metrics) == {"rlme/hash/right", "rlme/hash/short"}
    trace.last_reply = "fail"
    with pytest.raises(MissingReward):
        asyncio.run(verifiers.rlme_reward(task=task, trace=trace))


def test_adapters_need_the_standard_library_only() -> None:
    code = (
        "import sys, rlme.adapters.openrlhf, rlme.adapters.trl, rlme.adapters.verifiers, rlme.adapters.verl\n"
        "ours = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(m for m in ours if not m.startswith('_')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" not in out and "pydantic" not in out and "openai" not in out


def test_real_openrlhf(server: Server) -> None:
    agent = pytest.importorskip("openrlhf.utils.agent")
    body = {"query": [QUERY], "prompts": [PROMPT], "labels": ["4"]}
    url = f"http://127.0.0.1:{server.port}/openrlhf"
    file = agent.SingleTurnAgentExecutor(str(Path(openrlhf.__file__)))
    (reply,) = asyncio.run(file._fetch_rewards_via_func(body["query"], body["prompts"], body["labels"]))
    assert reply["rewards"] == [expected("Because.", PROMPT)]
    with serving(Judge()) as open_server:
        url = f"http://127.0.0.1:{open_server.port}/openrlhf"
        web = agent.SingleTurnAgentExecutor([url])
        (reply,) = asyncio.run(web._fetch_rewards_via_http(body["query"], body["prompts"], body["labels"]))
    assert reply["rewards"] == [expected("Because.", PROMPT)]


def test_real_verl() -> None:
    reward = pytest.importorskip("verl.trainer.ppo.reward")
    omegaconf = pytest.importorskip("omegaconf")
    custom = {"path": "pkg://rlme.adapters.verl", "name": "compute_score", "reward_kwargs": {"prompt_key": "question"}}
    score = reward.get_custom_reward_fn(omegaconf.OmegaConf.create({"reward": {"custom_reward_function": custom}}))
    assert inspect.iscoroutinefunction(score)
    call = {"data_source": "gsm8k", "ground_truth": "4", "solution_str": "Because.", "extra_info": {"question": "Why?"}}
    assert asyncio.run(score(**call))["score"] == expected("Because.")


def sections_of_the_guide() -> list[dict[str, Any]]:
    """`env.taskset.task.rewards` as docs/adapters.md has it: for verifiers, and in a source of prime-rl."""
    guide = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text()
    verifiers_toml, prime_toml = map(tomllib.loads, re.findall(r"```toml\n(.*?)```", guide, re.DOTALL))
    (source,) = prime_toml["orchestrator"]["train"]["source"]
    return [settings["env"]["taskset"]["task"]["rewards"] for settings in (verifiers_toml, source)]


def test_the_guides_sections_name_the_reward() -> None:
    """verifiers reads `module:function`; prime-rl hands its source's `env` to verifiers as it is."""
    for rewards in sections_of_the_guide():
        module, function = rewards["rlme"]["fn"].split(":")
        assert getattr(importlib.import_module(module), function) is verifiers.rlme_reward
        assert rewards["rlme"]["weight"] == 1.0


@pytest.mark.parametrize("section", [0, 1], ids=["verifiers", "prime-rl"])
def test_real_verifiers(section: int) -> None:
    vf = pytest.importorskip("verifiers.v1")
    from verifiers.v1.configs.task import TaskConfig

    config = TaskConfig.model_validate({"rewards": sections_of_the_guide()[section]})
    task = vf.Task(vf.TaskData(prompt="Why?"), config)
    for reply, works in (("Because.", True), ("fail", False)):
        trace = vf.Trace.model_construct(root_reply=reply, rewards={}, metrics={}, nodes=[])
        if works:
            asyncio.run(task.score(trace))
            assert json.dumps(expected("Because."))[:8] in json.dumps({k: str(v) for k, v in trace.rewards.items()})
        else:
            with pytest.raises(vf.TaskError, match="no reward"):
                asyncio.run(task.score(trace))

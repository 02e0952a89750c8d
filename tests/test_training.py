"""Whole runs on tiny models: every kind of evaluator and reward, what is written, and that it loads."""

from __future__ import annotations

import json
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from rlme import InputError, Judging, LocalEvaluator, MetaReward, RLMETrainer, load_model, load_tokenizer
from rlme.cli import main
from rlme.commands import find_config, read_config
from rlme.key_values import KeyValues
from rlme.models import fast_bfloat16, slow_bfloat16
from tests.tiny_runs import PROMPTS, read_metrics, read_rollouts, write_config, write_jsonl


def train(*arguments: str) -> None:
    """The command, which returns when all is well."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 0


def weighted(row: dict[str, Any]) -> float:
    return sum(j["weight"] * j["score"] for j in row["judgements"])


EVALUATORS: dict[str, Any] = {
    "live": ["live"],
    "frozen": ["frozen"],
    "another": "OTHER",
    "ensemble": [
        {"model": "live", "weight": 0.5},
        {"model": "frozen", "weight": 0.3},
        {"model": "OTHER", "weight": 0.2, "name": "other"},
    ],
    "held out": ["live", {"model": "OTHER", "weight": 0, "name": "other"}],
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", EVALUATORS)
def test_every_evaluator(kind: str, lora: bool, tiny_policy_dir: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    evaluators = json.loads(json.dumps(EVALUATORS[kind]).replace("OTHER", str(tiny_base_dir)))
    config = write_config(tmp_path, tiny_policy_dir, evaluators=evaluators, **({"lora": {"r": 2}} if lora else {}))
    train(str(config))
    rows = read_rollouts(tmp_path / "run")
    assert len(rows) == 2 * 2 * 3
    n = len(evaluators) if isinstance(evaluators, list) else 1
    for row in rows:
        assert len(row["judgements"]) == 2 * n
        assert row["reward"] == pytest.approx(weighted(row))
        assert row["correct"] is not None and row["gold"] is not None
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics] == [1, 2]
    for line in metrics:
        step = [r for r in rows if r["step"] == line["step"]]
        assert line["reward"] == pytest.approx(sum(r["reward"] for r in step) / len(step), abs=1e-5)
        assert line["gold/accuracy"] == pytest.approx(sum(r["correct"] for r in step) / len(step))
        for j in step[0]["judgements"]:
            key = f"judge/{j['evaluator']}/{j['question']}"
            values = [
                k["mass"]
                for r in step
                for k in r["judgements"]
                if (k["evaluator"], k["question"]) == (j["evaluator"], j["question"])
            ]
            assert line[f"{key}/mass"] == pytest.approx(sum(values) / len(values))
        assert {"time/sample", "time/judge", "time/update", "tokens_per_second/sample", "memory/peak_mb"} <= set(line)
    assert "time/load" in metrics[0]
    if kind == "held out":
        assert {j["weight"] for r in rows for j in r["judgements"] if j["evaluator"] == "other"} == {0}


def test_frozen_does_not_move_and_live_does(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """The same question to both: equal at step 1, different once the policy has moved."""
    config = write_config(
        tmp_path,
        tiny_policy_dir,
        evaluators=["live", {"model": "frozen", "dtype": "float32"}],
        train={"steps": 3, "learning_rate": 0.05},
    )
    train(str(config))
    first, *_, last = read_metrics(tmp_path / "run")
    assert first["judge/live/correct/score"] == pytest.approx(first["judge/frozen/correct/score"], abs=1e-5)
    assert abs(last["judge/live/correct/score"] - last["judge/frozen/correct/score"]) > 1e-3


def test_live_judging_does_not_compute_again_what_sampling_did(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name, limit in (("reused", 1 << 30), ("computed", 0)):
        monkeypatch.setattr("rlme.training.trainer.KeyValues", lambda limit=limit: KeyValues(limit))
        (tmp_path / name).mkdir()
        judging = {"template": "paper", "readout": "marker"}
        # Small steps: what rounding differs in is not to become another sign in Adam's first ones.
        steps = {"learning_rate": 1e-5}
        train(str(write_config(tmp_path / name, tiny_policy_dir, judging=judging, train=steps)))
        runs.append(read_metrics(tmp_path / name / "run"))
    for reused, computed in zip(*runs, strict=True):
        assert reused["tokens/judged"] < computed["tokens/judged"]
        for key, value in computed.items():
            if not key.startswith(("time", "tokens", "memory")):
                assert reused[key] == pytest.approx(value, abs=2e-5), key


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_saved_loads_and_is_safetensors(lora: bool, tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_policy_dir, train={"learning_rate": 0.05}, **({"lora": {"r": 2}} if lora else {})
    )
    train(str(config))
    final = tmp_path / "run" / "final"
    assert list(final.glob("*.safetensors")) and not list(final.glob("*.bin"))
    trained = AutoModelForCausalLM.from_pretrained(final)
    start = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    ids = torch.tensor([[5, 6, 7]])
    assert (trained(ids).logits - start(ids).logits).abs().max() > 1e-4
    if lora:
        assert (tmp_path / "run" / "final-adapter" / "adapter_model.safetensors").is_file()


def test_known_answers_alone_ask_nobody(tiny_policy_dir: Path, tmp_path: Path) -> None:
    data = {"completion_format": r"regex:(\S)", "answer_format": "####"}
    train(str(write_config(tmp_path, tiny_policy_dir, reward={"mode": "rlvr"}, questions={}, data=data)))
    assert all(r["judgements"] == [] and r["reward"] in (0.0, 1.0) for r in read_rollouts(tmp_path / "run"))


@pytest.mark.parametrize("mode", ["rlvr", "rlvr+rlme normalized", "rlvr+rlme sum"])
def test_reward_modes(mode: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    name, _, combine = mode.partition(" ")
    reward = {"mode": name, "rlvr_weight": 2.0, "rlme_weight": 0.5} | ({"combine": combine} if combine else {})
    # an answer that some completions hit by chance: any digit
    rows = [{"question": f"Say {i}", "answer": "#### 1"} for i in range(4)]
    config = write_config(
        tmp_path,
        tiny_policy_dir,
        reward=reward,
        data={"completion_format": r"regex:(\S)", "answer_format": "####"},
        train={"steps": 1, "prompts_per_step": 4, "group_size": 4},
    )
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    train(str(config))
    rollouts = read_rollouts(tmp_path / "run")
    gold = [float(r["correct"]) for r in rollouts]
    judged = [weighted(r) for r in rollouts]

    def normal(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return [(v - mean) / std if std else 0.0 for v in values]

    if name == "rlvr":
        expected = gold
    elif combine == "sum":
        expected = [2 * g + 0.5 * j for g, j in zip(gold, judged, strict=True)]
    else:
        expected = [2 * g + 0.5 * j for g, j in zip(normal(gold), normal(judged), strict=True)]
    assert [r["reward"] for r in rollouts] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["rlvr", "rlvr+rlme", "rlme"])
def test_the_judged_part_of_a_hybrid_reward_is_shown(mode: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Normalised, the reward's mean is 0 whatever happens; what is not trained on is not shown as if it were."""
    data = {"eval": str(write_jsonl(tmp_path / "held-out.jsonl", PROMPTS[:2]))}
    train(str(write_config(tmp_path, tiny_policy_dir, data=data, reward=mode)))
    for line in read_metrics(tmp_path / "run"):
        assert ("eval/reward/judged" in line) == (mode == "rlvr+rlme" and "eval/gold/accuracy" in line)
        assert ("reward/judged" in line) == (mode == "rlvr+rlme" and line["step"] > 0)
    if mode == "rlvr+rlme":
        rows = [row for row in read_rollouts(tmp_path / "run") if row["step"] == 1]
        sums = [sum(j["weight"] * j["score"] for j in row["judgements"]) for row in rows]
        (line,) = (line for line in read_metrics(tmp_path / "run") if line["step"] == 1)
        assert line["reward/judged"] == pytest.approx(sum(sums) / len(sums))
        assert abs(line["reward"]) < 1e-9


def test_anchor_marks_a_fixed_fraction_of_the_prompts(tiny_policy_dir: Path, tmp_path: Path) -> None:
    def anchored(name: str, seed: int) -> set[int]:
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(
            folder, tiny_policy_dir, reward={"anchor": 0.5}, train={"steps": 4, "prompts_per_step": 3, "seed": seed}
        )
        train(str(config))
        rows = read_rollouts(folder / "run")
        by_prompt: dict[int, set[bool]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_index"], set()).add(row["anchored"])
        assert len(by_prompt) == len(PROMPTS) and all(len(v) == 1 for v in by_prompt.values())
        return {index for index, (value,) in ((i, tuple(v)) for i, v in by_prompt.items()) if value}

    first = anchored("a", 0)
    assert len(first) == len(PROMPTS) // 2
    assert any(anchored(f"b{seed}", seed) != first for seed in (1, 2, 3))


def test_held_out_prompts_are_measured_and_never_trained_on(tiny_policy_dir: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"question": f"Held out {i}?", "answer": "#### 1"} for i in range(5)])
    config = write_config(tmp_path, tiny_policy_dir, data={"eval": str(held)}, train={"steps": 3, "eval_every": 2})
    train(str(config))
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics if "eval/gold/accuracy" in m] == [0, 2, 3]
    assert all("Held out" in r["prompt"] for r in read_rollouts(tmp_path / "run", "eval"))
    assert not any("Held out" in r["prompt"] for r in read_rollouts(tmp_path / "run"))


def test_the_distance_from_the_start_is_the_kl_on_its_own_answers(tiny_policy_dir: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"question": f"Held out {i}?", "answer": "#### 1"} for i in range(5)])
    config = write_config(
        tmp_path, tiny_policy_dir, data={"eval": str(held)}, train={"steps": 2, "eval_every": 1, "learning_rate": 1e-2}
    )
    train(str(config))
    measured = {m["step"]: m["eval/kl_to_start"] for m in read_metrics(tmp_path / "run")}
    assert measured[0] == 0 and measured[2] > 1e-4
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval" / "start.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    model, terms = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final"), []
    for prompt, answer, before in lines:
        logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        now = logps[range(len(answer)), answer].tolist()
        terms += [math.exp(b - a) - 1 - (b - a) for a, b in zip(before, now, strict=True)]
    assert measured[2] == pytest.approx(sum(terms) / len(terms), rel=1e-3)


def test_measuring_changes_nothing(tiny_policy_dir: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"question": "Held out?", "answer": "#### 1"}])
    results = []
    for name, data in (("with", {"eval": str(held)}), ("without", {})):
        folder = tmp_path / name
        folder.mkdir()
        train(str(write_config(folder, tiny_policy_dir, data=data, train={"steps": 3, "eval_every": 1})))
        results.append([(r["completion"], r["reward"]) for r in read_rollouts(folder / "run")])
    assert results[0] == results[1]


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_packs_do_not_change_the_update(loss: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    """The same run with one pass and with many: equal weights up to rounding, for every way TRL normalises a loss."""
    weights = []
    for budget in (8192, 64):
        folder = tmp_path / str(budget)
        folder.mkdir()
        config = write_config(
            folder, tiny_policy_dir, train={"loss": loss, "token_budget": budget, "steps": 2, "learning_rate": 1e-2}
        )
        train(str(config), "--set", "trl.adam_epsilon=1e-3")
        weights.append(AutoModelForCausalLM.from_pretrained(folder / "run" / "final").state_dict())
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-5), name


def test_packs_change_neither_ratios_nor_which_tokens_are_uncertain(tiny_policy_dir: Path, tmp_path: Path) -> None:
    for name, changes in {
        "ratios": {"loss": "grpo", "clip": 0.001, "updates_per_batch": 3},
        "uncertain": {},
    }.items():
        runs = []
        for budget in (8192, 64):
            folder = tmp_path / f"{name}-{budget}"
            folder.mkdir()
            config = write_config(
                folder,
                tiny_policy_dir,
                train={"steps": 3, "learning_rate": 1e-2, "token_budget": budget, **changes},
            )
            settings = ["trl.adam_epsilon=1e-3", *(["trl.top_entropy_quantile=0.3"] if name == "uncertain" else [])]
            train(str(config), *(part for setting in settings for part in ("--set", setting)))
            runs.append(read_metrics(folder / "run"))
        for whole, packs in zip(*runs, strict=True):
            for key in ("loss", "entropy", "clip_ratio", "grad_norm"):
                assert packs.get(key, 0) == pytest.approx(whole.get(key, 0), abs=1e-4), (name, key)
        if name == "ratios":
            assert any(0 < line["clip_ratio"] < 1 for line in runs[0])


@pytest.mark.parametrize("share", [True, False])
def test_a_stop_string_ends_a_completion_whoever_samples_it(share: bool, tiny_policy_dir: Path, tmp_path: Path) -> None:
    """And it counts as finished: it is not left out with the truncated ones."""
    stops = ["e", "a", "o", "1"]
    changes = {"stop": stops, "share_prefixes": share, "max_completion_tokens": 24, "group_size": 4}
    config = write_config(tmp_path, tiny_policy_dir, train={**changes, "temperature": 1.5})
    train(str(config), "--set", "trl.mask_truncated_completions=true")
    rows = read_rollouts(tmp_path / "run")
    ended = [row for row in rows if any(stop in row["completion"] for stop in stops)]
    assert ended and not any(row["truncated"] for row in ended)
    assert all(row["tokens"] < 24 for row in ended)
    assert any(line["grad_norm"] > 0 for line in read_metrics(tmp_path / "run"))


def test_too_many_failed_judgements_stop_the_run_with_its_state(
    tiny_policy_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    config = write_config(tmp_path, tiny_policy_dir, judging={"max_context_tokens": 16})
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config)])
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert "context_too_long" in said and "--resume" in said


def test_a_missing_reward_leaves_the_group_mean_and_the_loss(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Long completions cannot be judged; they have no reward, no advantage, and the mean is that of the others."""
    limit = 68
    config = write_config(
        tmp_path,
        tiny_policy_dir,
        questions={"q": "Is it?"},
        judging={"max_context_tokens": limit},
        reward={"max_failure_rate": 1.0},
        train={"steps": 3, "max_completion_tokens": 24, "group_size": 4},
    )
    train(str(config))
    rows = read_rollouts(tmp_path / "run")
    missing = [r for r in rows if r["reward"] is None]
    assert missing and len(missing) < len(rows), "the limit does not separate"
    assert all(r["advantage"] is None and r["judgements"][0]["failure"] == "context_too_long" for r in missing)
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt_index"]), []).append(row)
    for group in groups.values():
        there = [r for r in group if r["reward"] is not None]
        for r in there:
            assert r["advantage"] == pytest.approx(r["reward"] - sum(x["reward"] for x in there) / len(there), abs=1e-5)
    for line in read_metrics(tmp_path / "run"):
        step = [r for r in rows if r["step"] == line["step"]]
        assert line.get("reward_missing") == pytest.approx(sum(r["reward"] is None for r in step) / len(step))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("updates", [1, 2])
def test_kl_is_to_the_starting_model(lora: bool, updates: int, tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        tiny_policy_dir,
        train={"kl": 0.01, "steps": 4, "learning_rate": 0.02, "updates_per_batch": updates},
        **({"lora": {"r": 2}} if lora else {}),
    )
    train(str(config))
    kl = [line["kl"] for line in read_metrics(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-5) and all(value > 1e-4 for value in kl[1:])


def test_the_judge_cache_changes_nothing_and_serves_the_next_run(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from rlme.evaluators.cache import JudgeCache

    cache = tmp_path / "cache.sqlite"
    runs = []
    for name, judging in (("without", {}), ("first", {"cache": str(cache)}), ("second", {"cache": str(cache)})):
        folder = tmp_path / name
        folder.mkdir()
        train(str(write_config(folder, tiny_policy_dir, evaluators=["live", "frozen"], judging=judging)))
        runs.append([(r["completion"], r["reward"]) for r in read_rollouts(folder / "run")])
        if name == "first":
            held = JudgeCache(cache).stats()
    assert runs[0] == runs[1] == runs[2]
    # one answer for each text and question; nothing of the live policy; the second run added nothing
    assert held.answers == JudgeCache(cache).stats().answers > 0 and len(held.by_evaluator) == 1


def test_more_prompts_a_step_than_there_are(tiny_policy_dir: Path, tmp_path: Path) -> None:
    train(str(write_config(tmp_path, tiny_policy_dir, train={"prompts_per_step": 8, "steps": 1})))
    assert len(read_rollouts(tmp_path / "run")) == 24


def test_zero_steps_only_measure(tiny_policy_dir: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [{"question": "Held out?", "answer": "#### 1"}])
    train(str(write_config(tmp_path, tiny_policy_dir, data={"eval": str(held)}, train={"steps": 0})))
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [0]


def test_the_resolved_configuration_runs_again(tiny_policy_dir: Path, tmp_path: Path) -> None:
    train(str(write_config(tmp_path, tiny_policy_dir)))
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    info = content.pop("run_info")
    assert info["format"] == 1 and info["versions"]["torch"] == version("torch")
    content["output"] = str(tmp_path / "again")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    train(str(tmp_path / "again.yaml"))
    assert read_rollouts(tmp_path / "again") == read_rollouts(tmp_path / "run")


def test_the_papers_recipe_runs_with_a_small_model(tiny_base_dir: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(find_config("paper-gsm8k").read_text())
    data = write_jsonl(tmp_path / "gsm.jsonl", PROMPTS)
    recipe["model"]["path"] = str(tiny_base_dir)
    recipe["data"] |= {"train": str(data), "eval": str(data), "name": None}
    recipe["train"] |= {"steps": 2, "max_completion_tokens": 8, "precision": "float32"}
    # these three need a GPU: vLLM, and the paged optimiser of bitsandbytes
    recipe["trl"] = {k: v for k, v in recipe["trl"].items() if k != "optim" and not k.startswith(("use_vllm", "vllm"))}
    recipe["output"] = str(tmp_path / "run")
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(recipe))
    train(str(tmp_path / "paper.yaml"))
    rows = read_rollouts(tmp_path / "run")
    assert len(rows) == 2 * 96
    assert rows[0]["prompt"].startswith("---------Problem---------")


@pytest.mark.parametrize("recipe", ["quickstart", "tone"])
def test_recipes_run_with_a_small_model(recipe: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    overrides = [f"model={tiny_policy_dir}", "train.steps=1", "train.max_completion_tokens=4", "train.eval_every=1"]
    arguments = [a for o in overrides for a in ("--set", o)]
    if recipe == "quickstart":
        with pytest.raises(SystemExit) as ended:
            main(["quickstart", "-o", str(tmp_path / "run"), *arguments, "--json", str(tmp_path / "table.json")])
        assert ended.value.code == 0
        what = [row["what"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]]
        assert any("list" in w for w in what)
    else:
        train(recipe, "-o", str(tmp_path / "run"), *arguments)
    assert len(read_rollouts(tmp_path / "run")) == 40


def test_every_shipped_training_recipe_parses() -> None:
    from rlme.commands import recipe_files

    for name in recipe_files():
        if name.startswith(("align", "paper-refeval")):
            with pytest.raises(InputError, match="rlme align"):
                read_config(name)
        else:
            assert read_config(name).train.steps > 0


def test_metareward_in_a_trainer_of_ones_own(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """The reward alone, in plain TRL: live and frozen find the trainer's model by themselves."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rlme import Judging, MetaReward, load_model, load_tokenizer

    reward = MetaReward(
        questions=["Is the answer correct?", "Is it about {{ topic }}?"],
        evaluators=["live", "frozen", str(tiny_policy_dir)],
        judging=Judging("reply", "yes_no"),
        answer="answer",
    )
    logs: list[dict[str, Any]] = []

    class Trainer(GRPOTrainer):
        def log(self, values: dict[str, float], start_time: float | None = None) -> None:
            super().log(values, start_time)
            logs.append(values)

    trainer = Trainer(
        load_model(str(tiny_policy_dir)),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=5, bf16=False, report_to="none", logging_steps=1, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": p["question"], "answer": "3", "topic": "sums"} for p in PROMPTS]),
        processing_class=load_tokenizer(str(tiny_policy_dir)),
    )  # fmt: skip
    trainer.train()
    assert len(reward.rows) == 4 and all(r["reward"] is not None for r in reward.rows)
    assert {"judge/live/Is the answer correct?/mass", "gold/accuracy", "reward"} <= set(logs[0])
    scores = {j["evaluator"]: j["score"] for j in reward.rows[0]["judgements"] if "correct" in j["question"]}
    assert scores["live"] == pytest.approx(scores["frozen"], abs=1e-5)


def test_more_tokens_than_the_model_reads_and_prompts_that_are_not_held_out(
    tiny_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"eval": str(write_jsonl(tmp_path / "held-out.jsonl", [PROMPTS[0], {**PROMPTS[0], "question": "And?"}]))}
    train(str(write_config(tmp_path, tiny_policy_dir, data=data, train={"steps": 0, "max_completion_tokens": 1020})))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 also trained on" in said
    assert "the model reads at most 1024 tokens" in said


def test_answers_of_ones_own(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """In a file, where YAML reads `yes` as a boolean; the report shows such a run like any other."""
    questions = {"tone": {"ask": "How is it?", "labels": [True, "fair", "poor"], "target": "fair"}}
    train(str(write_config(tmp_path, tiny_policy_dir, questions=questions, evaluators=["live", "frozen"])))
    for row in read_rollouts(tmp_path / "run"):
        assert row["reward"] == pytest.approx(sum(j["weight"] * j["score"] for j in row["judgements"]))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")])
    assert ended.value.code == 0
    assert "How is it?" in (tmp_path / "report.html").read_text()


def python_trainer(model: Any, tokenizer: Any, reward: MetaReward, folder: Path, prompts: int, **settings: Any) -> Any:
    rows = [{"prompt": f"What is {i} plus {i}?"} for i in range(prompts)]
    arguments = GRPOConfig(
        str(folder), num_generations=2, per_device_train_batch_size=4, max_completion_length=4, report_to="none",
        use_cpu=True, disable_tqdm=True, loss_type="cispo", epsilon_high=5.0, learning_rate=1e-2,
        **{"bf16": False, **settings},
    )  # fmt: skip
    return RLMETrainer(model, reward, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_bfloat16_on_a_cpu_without_it_is_named(tiny_policy_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert not (fast_bfloat16() and slow_bfloat16(torch.device("cpu")))
    reward = MetaReward("Is it short?", ["live"])
    monkeypatch.setattr("rlme.training.trainer.slow_bfloat16", lambda device: device.type == "cpu")
    for bf16 in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model, tokenizer = load_model(tiny_policy_dir), load_tokenizer(tiny_policy_dir)
            python_trainer(model, tokenizer, reward, tmp_path, 4, max_steps=1, bf16=bf16)
        assert any("bf16=False" in str(warning.message) for warning in said) == bf16


def test_epochs_see_all_prompts(tiny_policy_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_policy_dir), load_tokenizer(tiny_policy_dir)
    reward = MetaReward("Is it short?", ["live"], judging=Judging(template="reply", readout="yes_no"))
    trainer = python_trainer(model, tokenizer, reward, tmp_path, 6, num_train_epochs=2)
    seen: list[str] = []
    trainer.on_rollouts = lambda step, rows: seen.extend(row["prompt"] for row in rows)
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(set(seen)) == 6 and len(seen) == 24


def test_frozen_is_the_policy_as_training_began(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Not what lies where it was once loaded from; nor is the model that a KL is measured against."""
    model, tokenizer = load_model(tiny_policy_dir), load_tokenizer(tiny_policy_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    reward = MetaReward("Is it short?", ["live", "frozen"], judging=Judging(template="reply", readout="yes_no"))
    trainer = python_trainer(model, tokenizer, reward, tmp_path, 4, max_steps=2, beta=0.1, logging_steps=1)
    rows: list[Any] = []
    trainer.on_rollouts = lambda step, found: rows.append(found)
    trainer.train()
    for step, found in enumerate(rows):
        scores = [[j["score"] for j in row["judgements"]] for row in found]
        assert all((abs(live - frozen) < 1e-5) == (step == 0) for live, frozen in scores)
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert abs(kl[0]) < 1e-6 < kl[1]


def test_an_adapter_can_be_trained_on(tiny_policy_dir: Path, tmp_path: Path) -> None:
    for name, model, lora in (("a", tiny_policy_dir, {}), ("b", None, {}), ("c", None, None)):
        (tmp_path / name).mkdir()
        start = model or tmp_path / "a/run/final-adapter"
        train(str(write_config(tmp_path / name, start, lora=lora, train={"kl": 0.1})))
        if name != "a":
            assert abs(read_metrics(tmp_path / name / "run")[0]["kl"]) < 1e-6
    merged, adapter = (load_model(tmp_path / "b/run" / part) for part in ("final", "final-adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(adapter(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)


def test_text_that_begins_with_a_bos_gets_no_other(tiny_policy_dir: Path) -> None:
    """As what a chat template has written does, where it is continued as text."""
    tokenizer = load_tokenizer(tiny_policy_dir)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    evaluator = LocalEvaluator(None, tokenizer, name="it", chat=False)
    (ids,) = evaluator._encode([(f"{tokenizer.bos_token}What is it?", "")])
    assert ids.count(tokenizer.bos_token_id) == 1


def test_one_reward(tiny_policy_dir: Path) -> None:
    with pytest.raises(InputError, match="reward is a list"):
        RLMETrainer(str(tiny_policy_dir), [MetaReward("Is it short?")])  # type: ignore[arg-type]


def test_live_needs_a_trainer() -> None:
    from rlme import MetaReward

    with pytest.raises(InputError, match="live"):
        MetaReward(["Is it?"])(["prompt"], ["completion"])

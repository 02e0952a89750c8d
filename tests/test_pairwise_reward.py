"""The bridge: a pairwise judge as a group-relative reward, from Python and from a configuration file."""

import json

import pytest

from rlme.align.reward import PairwiseReward
from rlme.cli import main
from rlme.errors import InputError, RunStopped
from rlme.evaluators.local import LocalEvaluator
from tests.fake_judge import FakeJudge
from tests.test_pairwise_ranking import WORDS, ranked, texts
from tests.tiny_runs import read_metrics, read_rollouts, write_config, write_jsonl


def test_reward_is_the_win_rate_within_the_group():
    group = texts(3)
    reward = PairwiseReward("refeval", [FakeJudge()])
    prompts, completions = ["Count."] * 3 + ["Again."] * 2, [*group, "one two", "one two"]
    logged: dict[str, float] = {}
    found = reward(prompts, completions, reference=[WORDS] * 5, log_metric=logged.__setitem__)
    assert found[:3] == pytest.approx(ranked(FakeJudge(), group).scores)
    assert found[3:] == [0.5, 0.5]
    assert logged["pairwise/missing"] == 0 and 0 < logged["pairwise/mass"] <= 1


def test_a_failed_comparison_gives_none_not_a_half():
    reward = PairwiseReward("refeval", [FakeJudge(fail_on="poison")], max_failure_rate=0.5)
    logged: dict[str, float] = {}
    found = reward(["Q"] * 3, [*texts(2), "poison"], reference=[WORDS] * 3, log_metric=logged.__setitem__)
    assert found[2] is None and None not in found[:2]
    assert logged["pairwise/failures/timeout"] == 4


def test_reward_reads_chat_and_stored_columns_and_names_a_missing_reference():
    reward = PairwiseReward("refeval", [FakeJudge()])
    chat = [[{"role": "user", "content": "Count."}]] * 2
    completions = [[{"role": "assistant", "content": t}] for t in texts(2)]
    found = reward(chat, completions, columns=[json.dumps({"reference": [WORDS]})] * 2)
    assert found[1] > 0.5 > found[0]
    with pytest.raises(InputError, match="the dataset has no column 'reference'"):
        reward(chat, completions)
    with pytest.raises(InputError, match="has none"):
        reward(chat, completions, reference=["", ""])


def test_reward_stops_a_run_when_too_much_fails():
    reward = PairwiseReward("refeval", [FakeJudge(fail_on="Q")])
    with pytest.raises(RunStopped, match=r"3 of 3 completions have no reward \(timeout x6\)"):
        reward(["Q"] * 3, list(texts(3)), reference=[WORDS] * 3)


def test_reward_stands_in_for_questions_in_the_trainer(tiny_policy_dir, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig

    from rlme.models import load_model, load_tokenizer
    from rlme.training.trainer import RLMETrainer

    rows = [{"prompt": f"Question {i}?", "reference": "Yes Yes", "prompt_index": i} for i in range(4)]
    arguments = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, loss_type="cispo", epsilon_high=5.0, beta=0.0,
        scale_rewards="none",
    )  # fmt: skip
    rollouts: list[list[dict]] = []
    model = load_model(tiny_policy_dir)
    before = model.lm_head.weight.clone()
    trainer = RLMETrainer(
        model, PairwiseReward("refeval", [FakeJudge(lambda o, i, r: len(o) / 20)]), args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(tiny_policy_dir),
        on_rollouts=lambda step, rows: rollouts.append(rows),
    )  # fmt: skip
    trainer.train()
    (batch,) = rollouts
    assert len(batch) == 8
    for group in (batch[:4], batch[4:]):
        rewards = [row["reward"] for row in group]
        mean = sum(rewards) / 4
        assert [row["advantage"] for row in group] == pytest.approx([r - mean for r in rewards], abs=1e-6)
        order = sorted(group, key=lambda row: len(row["completion"]))
        assert order[0]["reward"] <= order[-1]["reward"]
    assert not before.cpu().equal(model.lm_head.weight.cpu())


def test_reward_trains_with_trl(tiny_policy_dir, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rlme.models import load_tokenizer

    rows = [{"prompt": f"Question {i}?", "reference": "Yes Yes"} for i in range(4)]
    arguments = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    reward = PairwiseReward("refeval", ["live"], schedule="unordered")
    trainer = GRPOTrainer(
        str(tiny_policy_dir), reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(tiny_policy_dir),
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0 <= logged["rewards/pairwise/mean"] <= 1
    assert logged["pairwise/missing"] == 0
    assert reward.rankings


# the same from a configuration file


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def pairwise_run(folder, model, **changes):
    rows = [{"question": f"Count to {i}.", "reference": "Yes Yes", "answer": f"#### {i}"} for i in range(4)]
    data = {"train": str(write_jsonl(folder / "pairs.jsonl", rows)), "prompt": "{{ question }}", "answer": "answer"}
    sections = {"data": data, "questions": {}, "reward": {"mode": "pairwise"}} | changes
    return write_config(folder, model, **sections)


@pytest.mark.parametrize("evaluator", ["live", "other"])
def test_a_run_rewarded_by_comparisons(evaluator, tiny_policy_dir, tmp_path):
    source = str(tiny_policy_dir) if evaluator == "other" else evaluator
    reward = {"mode": "pairwise", "pairwise": {"protocol": "refmatch", "schedule": "unordered"}}
    data = {"eval": str(write_jsonl(tmp_path / "held.jsonl", [{"question": "Count.", "answer": "#### 1"}]))}
    config = pairwise_run(tmp_path, tiny_policy_dir, reward=reward, evaluators=[source])
    run("train", str(config), *(f"--set=data.{key}={value}" for key, value in data.items()))
    rows = read_rollouts(tmp_path / "run")
    assert len(rows) == 12
    for row in rows:
        (verdict,) = row["judgements"]
        assert verdict["question"] == "refmatch" and 0 <= row["reward"] == verdict["score"] <= 1
        assert row["correct"] is False and row["gold"] in "0123"  # gold is measured, and only that
    for group in range(0, 12, 3):
        assert sum(row["reward"] for row in rows[group : group + 3]) == pytest.approx(1.5)  # a win is another's loss
    metrics = read_metrics(tmp_path / "run")
    assert all(0 < row["reward"] < 1 and row["gold/accuracy"] == 0 for row in metrics if "reward" in row)
    held_out = read_rollouts(tmp_path / "run", "eval")
    assert held_out and all(row["judgements"] == [] and row["reward"] is None for row in held_out)  # alone


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"questions": {"good": "Is it good?"}}, {}, "asks no questions: remove `questions`"),
        ({"reward": {"mode": "pairwise", "anchor": 0.1}}, {}, "reward.mode pairwise asks none"),
        ({"reward": {"mode": "rlvr", "pairwise": {}}}, {}, "reward.pairwise is given, but reward.mode is 'rlvr'"),
        ({"evaluators": []}, {}, "`evaluators` is empty"),
        ({"evaluators": [{"model": "live", "weight": 0}]}, {}, "an evaluator of weight 0"),
        ({"reward": {"mode": "pairwise", "pairwise": {"protocol": "refevil"}}}, {}, "did you mean 'refeval'"),
        ({}, {"reference": None}, "no column 'reference' (reward.pairwise.reference)"),
        ({}, {"reference": " "}, "row 1: the reference (column 'reference') is missing or empty"),
    ],
)
def test_what_a_pairwise_run_refuses(changes, rows, message, tiny_policy_dir, tmp_path, capsys):
    config = pairwise_run(tmp_path, tiny_policy_dir, **changes)
    if rows:
        kept = {k: v for k, v in rows.items() if v is not None}
        write_jsonl(tmp_path / "pairs.jsonl", [{"question": "Count.", "answer": "#### 1"} | kept])
    with pytest.raises(SystemExit):
        main(["train", str(config)])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_questions_of_a_run_may_show_the_reference(tiny_policy_dir, tmp_path):
    ask = {"like": 'Is it in line with "{{ reference }}"?'}
    config = pairwise_run(tmp_path, tiny_policy_dir, reward={"mode": "rlme"}, questions=ask)
    seen: list[str] = []
    original = LocalEvaluator.logprobs

    def spy(self, requests):
        seen.extend(str(request.context) for request in requests)
        return original(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEvaluator, "logprobs", spy)
        run("train", str(config))
    assert seen and all('in line with "Yes Yes"?' in context for context in seen)
    write_jsonl(tmp_path / "pairs.jsonl", [{"question": "Count.", "answer": "#### 1"}])
    with pytest.raises(SystemExit):
        main(["train", str(config), "-o", str(tmp_path / "again")])

"""Reward functions of a user's own beside the questions: values, weights, what is missing, metrics."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from rlme import InputError, Judging, MetaReward, RLMETrainer, RunStopped, load_model, load_tokenizer
from rlme.reward import judgement_metrics
from tests.rule_judge import RuleJudge

PROMPTS, COMPLETIONS = ["Say a.", "Say b."], ["a a a", "b"]
JUDGING = Judging("reply", "yes_no")


def words(completions: Any, **columns: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def meta(**options: Any) -> MetaReward:
    return MetaReward(["Is it short?"], [RuleJudge()], judging=JUDGING, **options)


def test_added_with_their_weights() -> None:
    plain = meta().score(PROMPTS, COMPLETIONS)
    reward = meta(functions={"words": (words, 0.5), "shown": (words, 0), "whole": words})
    assert reward(PROMPTS, COMPLETIONS) == [pytest.approx(r + 1.5 * n) for r, n in zip(plain, (3, 1), strict=True)]
    assert [row["functions"] for row in reward.rows] == [{"words": n, "shown": n, "whole": n} for n in (3.0, 1.0)]
    assert [row["reward"] for row in reward.rows] == reward.score(PROMPTS, COMPLETIONS)
    metrics = judgement_metrics(reward.rows)
    assert metrics["function/words"] == metrics["function/shown"] == 2


def test_they_see_the_data_and_the_tokens() -> None:
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, completion_ids: Any, level: Any, **others: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, level=level)
        return [0.0, 0.0]

    meta(functions={"look": look})(PROMPTS, COMPLETIONS, [[1, 2, 3], [4]], level=["easy", "hard"])
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": [[1, 2, 3], [4]], "level": ["easy", "hard"],
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_missing_is_no_number(value: Any) -> None:
    reward = meta(functions={"some": (lambda **_: [value, 1.0], 1)}, max_failure_rate=0.5)
    first, second = reward(PROMPTS, COMPLETIONS)
    assert first is None and second is not None
    assert judgement_metrics(reward.rows)["function/some"] == 1
    held_out = meta(functions={"some": (lambda **_: [value, 1.0], 0)})
    assert None not in held_out(PROMPTS, COMPLETIONS)
    with pytest.raises(RunStopped, match="function some x1"):
        meta(functions={"some": lambda **_: [value, 1.0]})(PROMPTS, COMPLETIONS)


def test_a_function_may_be_all_of_the_reward() -> None:
    from rlme import Question

    reward = MetaReward(
        [Question("Is it short?", weight=0)], [RuleJudge()], judging=JUDGING, functions={"words": words}
    )
    assert reward(PROMPTS, COMPLETIONS) == [3, 1]


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ({"f": 3}, "function 'f' is 3, expected a function"),
        ({"f": (words, "much")}, "function 'f': weight is 'much', expected a number"),
        ({"f": (words, math.nan)}, "function 'f': weight is nan"),
        ({"f": lambda **_: [1.0]}, "function 'f' returned 1 values for 2 completions"),
        ({"f": lambda **_: None}, "function 'f' returned None, expected a number or None for each completion"),
        ({"f": lambda **_: "12"}, "function 'f' returned '12', expected a number or None for each completion"),
        ({"f": lambda **_: {"a": 1.0, "b": 2.0}}, "function 'f' returned {'a': 1.0"),
        ({"f": lambda **_: ["1", 2.0]}, "function 'f' returned '1' for a completion, expected a number or None"),
        ({"f": lambda **_: [[1.0], [2.0]]}, r"function 'f' returned \[1.0\] for a completion"),
    ],
)
def test_mistakes(functions: Any, said: str) -> None:
    """Named, and before anything is asked."""
    judge = RuleJudge()
    with pytest.raises(InputError, match=said):
        MetaReward(["Is it short?"], [judge], judging=JUDGING, functions=functions)(PROMPTS, COMPLETIONS)
    assert judge.requests == []


def test_numbers_of_other_libraries() -> None:
    weight = np.float32(0.5)
    reward = meta(functions={"f": (lambda **_: np.array([1, 2]), weight), "g": (lambda **_: torch.ones(2), 0)})
    assert reward(PROMPTS, COMPLETIONS) == meta(functions={"f": (lambda **_: [1.0, 2.0], 0.5)})(PROMPTS, COMPLETIONS)


def test_in_training(tiny_policy_dir: Path, tmp_path: Path) -> None:
    def length(completion_ids: Any, **columns: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    reward = MetaReward(["Is it short?"], ["live"], judging=JUDGING, functions={"length": (length, 0.25)})
    trainer = RLMETrainer(
        load_model(str(tiny_policy_dir)),
        reward,
        args=GRPOConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
            use_cpu=True, bf16=False, report_to="none", logging_steps=1, save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": "What is 1 plus 1?"}, {"prompt": "What is 2 plus 2?"}]),
        processing_class=load_tokenizer(str(tiny_policy_dir)),
    )  # fmt: skip
    trainer.train()
    for row in reward.rows:
        judged = sum(j["score"] * j["weight"] for j in row["judgements"])
        assert row["functions"] == {"length": row["tokens"]}
        assert row["reward"] == pytest.approx(judged + 0.25 * row["tokens"])
    logged = next(line for line in trainer.state.log_history if "function/length" in line)
    assert logged["reward"] == pytest.approx(sum(row["reward"] for row in reward.rows) / 4, abs=1e-3)


def test_a_column_that_a_variable_hides_is_refused_in_python_too() -> None:
    reward = MetaReward(["Does it follow from {{ context }}?"], [RuleJudge()], judging=JUDGING)
    with pytest.raises(InputError, match="rename the column"):
        reward(PROMPTS, COMPLETIONS, context=["a passage", "another"])
    assert None not in MetaReward(["Is it short?"], [RuleJudge()], judging=JUDGING)(
        PROMPTS, COMPLETIONS, context=["", ""]
    )

"""TRL: a reward function that asks the reward server (in this process, use `rlme.MetaReward` itself).

GRPOTrainer(model, reward_funcs=RemoteReward("http://judge:8765"), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlme.adapters.client import RewardClient, known, plain_text
from rlme.errors import InputError


class RemoteReward:
    """TRL's contract: prompts, completions and columns in, one reward per completion out; None where it is missing,
    which TRL leaves out of the group's mean.

    `answer`: the column with the known answer, if the server is to see it. `columns`: those that its templates use.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        answer: str | None = None,
        columns: Sequence[str] = (),
        client: RewardClient | None = None,
    ) -> None:
        self.__name__ = "rlme"
        self.client = client or RewardClient(url)
        self.answer = answer
        self.columns = tuple(columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of a batch."""
        for name in (*self.columns, *([self.answer] if self.answer is not None else [])):
            if name not in columns:
                there = [column for column, values in columns.items() if isinstance(values, list)]
                raise InputError(
                    f"RemoteReward is to send column {name!r}, which the data set does not have; expected in `columns` "
                    f"and `answer` are names among its own: {', '.join(there) or '(none)'}"
                )
        items = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            item: dict[str, Any] = {
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "completion": _text(completion),
                "columns": {name: columns[name][i] for name in self.columns},
            }
            if self.answer is not None:
                item["answer"] = known(columns[self.answer][i])
            items.append(item)
        results = self.client.score(items)
        if log_metric is not None:
            for name, value in _means(results).items():
                log_metric(name, value)
        return [result["reward"] for result in results]


def _text(completion: Any) -> str:
    """What the policy said last; a conversation without a turn says nothing."""
    if isinstance(completion, str):
        return completion
    return str(plain_text(completion[-1].get("content"))) if len(completion) else ""


def _means(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {"reward_missing": [float(r["reward"] is None) for r in results]}
    for result in results:
        for j in result["judgements"]:
            if j["probability"] is not None:
                name = f"judge/{j['evaluator']}/{j['question']}/probability"
                values.setdefault(name, []).append(j["probability"])
    return {name: sum(some) / len(some) for name, some in values.items() if some}

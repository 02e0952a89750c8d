"""What asking an evaluator behind an endpoint would take, found by asking a stand-in.

A `Rehearsal` goes where its evaluator goes: judges, rankings and read-outs build their requests as ever. It sends none
of them, answers at random, and adds up what the evaluator says they may take.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from rlme.evaluators.endpoint_wire import Usage
from rlme.judgement import Answer, Message, Request

WORD = " the"
"""One token in nearly every vocabulary: stands for text that is not there yet."""
ROWS = 16
"""Prompts, spread over the data, whose requests are counted."""


def spread(count: int) -> list[int]:
    """Up to `ROWS` places evenly over a list of `count`."""
    return [i * count // ROWS for i in range(ROWS)] if count > ROWS else list(range(count))


class Rehearsal:
    """An `Evaluator` in another one's place; `usage` is what was asked of it, nothing cached, no call repeated."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator = evaluator
        self.name: str = evaluator.name
        self.chat: bool = evaluator.chat
        self.usage = Usage()
        self._random = random.Random(0)  # a knock-out needs winners

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers that mean nothing."""
        self._add(self.evaluator.estimate(requests))
        return [Answer(tuple(math.log(0.9 * self._random.random() + 0.05) for _ in r.continuations)) for r in requests]

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str]:
        """Texts at their longest."""
        self._add(self.evaluator.estimate(requests, max_tokens=max_tokens))
        return [WORD * max_tokens] * len(requests)

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Those of the evaluator."""
        kept: tuple[str, ...] = self.evaluator.spellings(candidates)
        return kept

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        """As the evaluator counts."""
        count: int | None = self.evaluator.count_tokens(context)
        return count

    def _add(self, more: Usage) -> None:
        self.usage = self.usage.plus(more)

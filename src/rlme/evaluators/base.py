"""What every evaluator can do, in this process or behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rlme.judgement import Answer, Failure, Message, Request


@runtime_checkable
class Evaluator(Protocol):
    """The one primitive under every judge: log-probabilities of a few continuations of a context.

    Implementations never raise for a single request that cannot be answered: they return an `Answer` with a
    `Failure`. They raise `InputError` for what a user has to mend (a missing chat template, a model that is not there).

    One that is asked elsewhere may also have `begin(requests, *, max_tokens=None)`: start asking about one completion
    without waiting; the next `logprobs` (with `max_tokens`: `write`) that asks the same finds it under way. One whose
    tokenizer is here has `control_tokens`, a pattern: what of an answer must not reach it (`rlme.control_tokens`).
    """

    name: str
    chat: bool
    """Whether the evaluator is asked through a chat template by default (an instruct model) or by text to continue."""

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in the order of the requests, whatever the timing."""
        ...

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        """Greedy text after each context (continuations ignored): the critique of the `reason` read-out."""
        ...

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Those of the candidate label spellings that this evaluator can be asked for together.

        Spellings the tokenizer cannot write are left out, and so are spellings whose tokens begin with another kept
        spelling's tokens: their probability is already contained in the shorter one's.
        """
        ...

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        """Length of a context in the evaluator's tokens, or None where it cannot be known (an endpoint)."""
        ...

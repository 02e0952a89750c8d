"""Requests to evaluators and what comes back: plain data, importable without torch.

Everything a judge does here (YES/NO, (a)/(b), a 0-4 scale) is *log-probabilities of a few continuations of a
context*. `Request` is that question, `Answer` the reply of one evaluator, and `Judgement` what a read-out made of
it. A judgement that could not be had is a `Failure` with a kind; it is never a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

NEGLIGIBLE = 0.01
"""Missing spellings that could together add less than this share to their label's probability do no harm."""


class Message(TypedDict):
    """One chat turn."""

    role: str
    content: str


class Failure(StrEnum):
    """Why a judgement is missing."""

    CONTEXT_TOO_LONG = "context_too_long"
    LABEL_MISSING = "label_missing"  # the server did not return the label's log-probability
    NOT_A_NUMBER = "not_a_number"  # NaN or an infinity where a log-probability should be
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"  # 5xx
    CONNECTION = "connection"  # refused, reset, or cut in the body
    MALFORMED = "malformed"  # an answer that is not what the protocol promises
    REFUSED = "refused"  # any other 4xx: the request itself is not accepted
    TEMPLATE = "template"  # the evaluation template could not be filled for this completion


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for log p(continuation | context) of each continuation.

    `context` is plain text to be continued, or chat messages that end with a user turn; `prefill` is the start of the
    assistant's answer (chat only; plain text already contains it). Continuations follow `context + prefill`.
    """

    context: str | tuple[Message, ...]
    continuations: tuple[str, ...]
    prefill: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluator's reply to one `Request`: a log-probability per continuation (natural log), or a failure.

    `bounded` marks continuations whose log-probability is only an upper bound (an endpoint did not return them).
    Token counts are those the evaluator processed for this request alone; `tokens_cached` of `tokens_in` were
    already computed for another request.
    """

    logprobs: tuple[float, ...] | None
    failure: Failure | None = None
    detail: str = ""
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    bounded: tuple[bool, ...] = ()

    @classmethod
    def failed(cls, kind: Failure, detail: str = "", *, tokens_in: int = 0) -> Answer:
        """An answer that could not be had."""
        return cls(None, kind, detail, tokens_in=tokens_in)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One evaluator's verdict on one question about one completion.

    `score` enters the reward: log p(target) for `marker` and `yes_no`, the expected rating in [0, 4] for `scale`;
    None when the judgement failed. `probability` is p(target) as the read-out defines it (for `scale`: score / 4).
    `logprobs` maps each label to its log-probability, spelling variants summed; `mass` is the probability of all
    labels together under the evaluator's full vocabulary, in [0, 1]. `bounded`: a label's probability is only an upper
    bound (an endpoint did not return it, and `missing_label: bound` was asked for).
    """

    evaluator: str
    question: str
    score: float | None
    probability: float | None = None
    logprobs: dict[str, float] = field(default_factory=dict)
    mass: float | None = None
    bounded: bool = False
    failure: Failure | None = None
    detail: str = ""
    critique: str | None = None
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether there is no number here."""
        return self.score is None

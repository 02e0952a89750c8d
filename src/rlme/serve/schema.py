"""Requests and replies of the reward server."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from rlme.adapters.client import known, plain_text

MAX_ITEMS = 1024
"""Completions in one request."""
RESERVED = {"prompt", "completion", "answer", "gold", "anchored", "columns"}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ChatMessage(BaseModel):
    """One chat turn; keys other than these are ignored."""

    role: str
    content: Annotated[str, BeforeValidator(plain_text)]
    """A text; text parts (`{type: text, text: ...}`) are joined, and null (a turn of tool calls alone) is empty."""


class Item(_Closed):
    """One completion to be judged."""

    prompt: str | list[ChatMessage]
    """The prompt as text, or as chat messages."""
    completion: str
    """What the policy answered."""
    answer: Annotated[str | None, AfterValidator(known)] = None
    """The known answer (an empty one is none): for rlvr rewards, for `correct` in the reply, and for an anchor; never
    shown otherwise."""
    anchored: bool = False
    """Show the known answer to the evaluators."""
    columns: dict[str, Any] = {}
    """Further variables of the templates."""

    @field_validator("columns")
    @classmethod
    def _free_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := RESERVED & value.keys():
            raise ValueError(f"a column cannot be called {sorted(taken)[0]!r}")
        return value


class ScoreRequest(_Closed):
    """A batch of completions."""

    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)


class JudgementReply(BaseModel):
    """One evaluator's verdict on one question."""

    evaluator: str
    question: str
    weight: float
    """Its share in the reward: evaluator weight times question weight."""
    score: float | None
    """What enters the reward; null when the judgement failed."""
    probability: float | None
    mass: float | None
    bounded: bool
    """A label's probability is only an upper bound: the endpoint did not return it."""
    failure: str | None
    """Why there is no score."""
    detail: str
    critique: str | None
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    cost: float


class ItemReply(BaseModel):
    """The reward of one completion."""

    reward: float | None
    """null: a judgement that counts failed. Leave the completion out of the loss and of the group's mean."""
    correct: bool | None
    judgements: list[JudgementReply]


class ScoreReply(BaseModel):
    """Results in the order of the request's items."""

    results: list[ItemReply]
    missing: int
    """How many rewards are null."""


class OpenRLHFRequest(BaseModel):
    """What OpenRLHF posts to `--reward.remote_url`."""

    query: list[str] = Field(min_length=1, max_length=MAX_ITEMS)
    prompts: list[str]
    labels: list[Any] | None = None


class OpenRLHFReply(BaseModel):
    """What OpenRLHF reads."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]

"""The configuration of an evaluator behind an endpoint. Imports without torch and without the HTTP client."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Prices(BaseModel):
    """What a call costs, in any one currency, per million tokens."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    input: float = Field(0.0, ge=0)
    """A million prompt tokens."""
    cached_input: float | None = Field(None, ge=0)
    """A million prompt tokens that the server had in its cache. Default: as `input`."""
    output: float = Field(0.0, ge=0)
    """A million generated tokens. A judgement generates one token a call."""

    def cost(self, tokens_in: int, tokens_cached: int, tokens_out: int) -> float:
        """Money for one call; `tokens_cached` of `tokens_in` came from the server's cache."""
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = tokens_in - tokens_cached
        return (fresh * self.input + tokens_cached * cached + tokens_out * self.output) / 1e6


HOW_IT_IS_CALLED = (
    "base_url", "api_key_env", "concurrency", "deadline", "retries", "requests_per_minute", "tokens_per_minute",
    "outage", "max_cost",
)  # fmt: skip
"""Keys that change how a server is reached and what it may take, not what it says: they may change in a run."""
SAME_VERDICTS = {*HOW_IT_IS_CALLED, "prices"}
"""Keys with which other verdicts stay as they are."""


class EndpointConfig(BaseModel):
    """An OpenAI-compatible server that answers the questions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    base_url: str
    """Where the API begins, e.g. `http://localhost:8000/v1`."""
    model: str | None = None
    """The model's name on the server. Default: the only one it serves."""
    revision: str | None = None
    """Version of the served weights, if you know it: part of the judge cache's key, nothing else."""
    api: Literal["auto", "chat", "completions"] = "auto"
    """Ask through the chat template or by text to continue. auto: chat where the server has a chat template."""
    api_key_env: str | None = None
    """Name of the environment variable with the key. The key itself never stands in a file."""
    concurrency: int = Field(16, ge=1, le=4096)
    """Requests under way at the same time (of all processes of a run). A request's own calls, and neighbours that share
    most of their text, follow each other, so that they find the server's prefix cache warm."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Calls started per minute by all processes of a run, evenly spaced. Default: no limit."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Prompt and generated tokens per minute, evenly spaced. Default: no limit."""
    deadline: float = Field(60.0, gt=0)
    """Seconds for one call, from the first byte sent to the last byte read."""
    retries: int = Field(4, ge=0)
    """Further attempts at a call that failed in a way that may pass (a rate limit is waited out, not counted here)."""
    outage: float = Field(600.0, ge=0)
    """Seconds to wait for a server that is down or keeps refusing; then the run stops with its state saved."""
    missing_label: Literal["fail", "bound"] = "fail"
    """A label outside the log-probabilities the server returned: a failed judgement, or (bound) the smallest returned
    log-probability as an upper bound, marked as such. Missing spellings of a label that is there count as missing only
    if they could change its probability by more than 1 %."""
    prices: Prices = Prices()
    """Price per million tokens: {input, cached_input, output}."""
    max_cost: float | None = Field(None, gt=0)
    """The run stops, with its state saved, before it spends more than this (in the currency of `prices`). What it spent
    before a resume counts."""
    extra_body: dict[str, Any] = {}
    """Further fields sent with every call, for what only your server knows, e.g. `{cache_prompt: false}`."""

    @field_validator("base_url")
    @classmethod
    def _http(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {value!r}, expected an address that begins with http:// or https://")
        if "@" in value.split("/")[2]:
            raise ValueError("base_url holds a user name or password; name an environment variable in `api_key_env`")
        try:
            address = urlsplit(value)
            usable = bool(address.hostname) and (address.port is None or address.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"base_url is {value!r}, expected http://HOST:PORT/v1 with a port from 1 to 65535")
        return value.rstrip("/")

    @field_validator("max_cost")
    @classmethod
    def _priced(cls, value: float | None, info: Any) -> float | None:
        prices = info.data.get("prices")
        if value is not None and prices is not None and prices.input == 0 and prices.output == 0:
            raise ValueError("max_cost needs `prices`, else nothing ever costs anything")
        return value

"""Reading log-probabilities out of a server's replies. Nothing in a reply is believed before it was checked.

Two forms are in use for "the most likely next tokens": chat's `logprobs.content[0].top_logprobs` (a list of objects;
llama.cpp uses it on both routes, with token ids), and completions' `logprobs.top_logprobs[0]` (token -> log-prob;
vLLM writes `token_id:123` as the token when asked to).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlme.judgement import Failure

ROUNDING = 1e-3
"""A log-probability may exceed 0 by this much (half-precision servers); more is no log-probability."""
ABSENT = -9999.0
"""Servers write this (or less) for "not among those computed" and for log 0: it stands for no number."""
_TOKEN_ID = "token_id:"


class CallFailed(Exception):
    """A call that brought no usable reply. `passing`: another attempt may succeed. `fatal`: no call ever will."""

    def __init__(
        self,
        kind: Failure,
        detail: str,
        *,
        passing: bool = True,
        fatal: bool = False,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.passing = passing
        self.fatal = fatal
        self.retry_after = retry_after
        self.status = status


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The most likely next tokens after a context, by id where the server gives ids and by text otherwise.

    `floor` is the last log-probability among as many as were asked for: what is not in the list is at most that. None:
    the list has fewer numbers than that, so nothing can be said about what it lacks. `count` is how many it has.
    """

    by_id: dict[int, float]
    by_text: dict[bytes, float]
    floor: float | None
    count: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call as the server counted them."""

    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0

    def plus(self, more: Usage) -> Usage:
        """Both together."""
        return Usage(
            self.tokens_in + more.tokens_in, self.tokens_cached + more.tokens_cached, self.tokens_out + more.tokens_out
        )

    def times(self, factor: float) -> Usage:
        """So many times as much."""
        return Usage(*(round(n * factor) for n in (self.tokens_in, self.tokens_cached, self.tokens_out)))


def read_usage(reply: Any) -> Usage:
    """The reply's token counts, OpenAI's or SGLang's; zeros where the server reports none."""
    usage = (reply.get("usage") or reply.get("meta_info")) if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details", usage)
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    total = _count(usage.get("prompt_tokens"))
    return Usage(total, min(_count(cached), total), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        n = len(choices) if isinstance(choices, list) else "no"
        raise CallFailed(Failure.MALFORMED, f"the reply has {n} choices, expected 1")
    return choices[0]


def read_text(reply: Any) -> str:
    """The generated text of a chat or completions reply."""
    choice = _choice(reply)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        raise CallFailed(Failure.MALFORMED, "the reply has no text")
    return text


def read_next_tokens(reply: Any, *, asked: int) -> NextTokens:
    """The next-token log-probabilities of a reply to a request for the `asked` most likely ones.

    Raises `CallFailed`: MALFORMED (not what the protocol promises), LABEL_MISSING (no log-probabilities at all),
    NOT_A_NUMBER (NaN, null or an infinity among them).
    """
    logprobs = _choice(reply).get("logprobs")
    if not isinstance(logprobs, dict):
        raise CallFailed(Failure.LABEL_MISSING, "the reply has no log-probabilities")
    pairs: list[tuple[Any, Any, Any, Any]] = []  # id, token, bytes, log-probability
    content, top = logprobs.get("content"), logprobs.get("top_logprobs")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        alternatives = content[0].get("top_logprobs")
        if not isinstance(alternatives, list) or not all(isinstance(a, dict) for a in alternatives):
            raise CallFailed(Failure.MALFORMED, "top_logprobs is not a list of tokens")
        pairs = [(a.get("id"), a.get("token"), a.get("bytes"), a.get("logprob")) for a in alternatives]
        if len(content) != 1:
            raise CallFailed(Failure.MALFORMED, f"{len(content)} tokens came back, 1 was asked for")
    elif isinstance(top, list) and top and isinstance(top[0], dict):
        if len(top) != 1:
            raise CallFailed(Failure.MALFORMED, f"{len(top)} tokens came back, 1 was asked for")
        pairs = [(None, token, None, value) for token, value in top[0].items()]
    if not pairs:
        raise CallFailed(Failure.LABEL_MISSING, "the reply has no log-probabilities")

    by_id: dict[int, float] = {}
    by_text: dict[bytes, float] = {}
    ranked: list[float] = []
    for token_id, token, raw, value in pairs:
        logprob = _logprob(value)
        if not isinstance(token, str):
            raise CallFailed(Failure.MALFORMED, "a token in top_logprobs has no text")
        if logprob <= ABSENT:
            continue
        ranked.append(logprob)
        if token.startswith(_TOKEN_ID) and token[len(_TOKEN_ID) :].isdigit():
            by_id[int(token[len(_TOKEN_ID) :])] = logprob
            continue
        if isinstance(token_id, int) and not isinstance(token_id, bool):
            by_id[token_id] = logprob
        by_text.setdefault(_bytes(token, raw), logprob)
    _check_sum(by_id or by_text)
    ranked.sort(reverse=True)  # servers may add the token that they drew, however unlikely, to the list
    return NextTokens(by_id, by_text, ranked[asked - 1] if len(ranked) >= asked else None, len(ranked))


def read_named_tokens(reply: Any, named: Sequence[int]) -> NextTokens:
    """The next-token log-probabilities of `named` tokens in a reply of SGLang's `/generate`:
    `meta_info.output_token_ids_logprobs` holds, for each generated token, a list of [log-probability, id, text].

    Raises `CallFailed` as `read_next_tokens` does, and LABEL_MISSING when a named token is not there.
    """
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise CallFailed(Failure.MALFORMED, "the reply has no meta_info")
    steps = meta.get("output_token_ids_logprobs")
    if not isinstance(steps, list) or not steps or steps[0] is None:
        raise CallFailed(Failure.LABEL_MISSING, "the reply has no log-probabilities")
    if len(steps) != 1:
        raise CallFailed(Failure.MALFORMED, f"{len(steps)} tokens came back, 1 was asked for")
    by_id: dict[int, float] = {}
    for entry in steps[0] if isinstance(steps[0], list) else [None]:
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[1], int):
            raise CallFailed(Failure.MALFORMED, "output_token_ids_logprobs is not a list of [log-probability, id, ...]")
        if (logprob := _logprob(entry[0])) > ABSENT:
            by_id[entry[1]] = logprob
    if not all(token in by_id for token in named):
        raise CallFailed(Failure.LABEL_MISSING, "a label that was named is not in the reply")
    _check_sum(by_id)
    return NextTokens(by_id, {}, None)


def _check_sum(logprobs: Mapping[Any, float]) -> None:
    if math.fsum(math.exp(v) for v in logprobs.values()) > 1 + 0.02:
        raise CallFailed(Failure.MALFORMED, "the probabilities in the reply add up to more than 1")


def _bytes(token: str, raw: Any) -> bytes:
    if isinstance(raw, list) and raw and all(isinstance(b, int) and 0 <= b < 256 for b in raw):
        return bytes(raw)
    return token.encode("utf-8", "surrogatepass")


def _logprob(value: Any) -> float:
    if value is None:
        raise CallFailed(Failure.NOT_A_NUMBER, "a log-probability in the reply is null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CallFailed(Failure.MALFORMED, f"a log-probability in the reply is {str(value)[:40]!r}")
    if isinstance(value, int):
        value = float(max(-(10**9), min(10**9, value)))  # JSON's integers have no size limit
    if math.isnan(value) or math.isinf(value):
        raise CallFailed(Failure.NOT_A_NUMBER, f"a log-probability in the reply is {value}")
    if value > ROUNDING:
        raise CallFailed(Failure.MALFORMED, f"a log-probability in the reply is {value}, above 0")
    return min(value, 0.0)

"""Asking a server that shares its tokenizer (vLLM, llama.cpp, SGLang): contexts and labels are exact token ids.

The chat template and the tokenizer run on the server, the ids go to its completions route (SGLang: `/generate`), and
the next-token log-probability of each label token is read. Labels of several tokens take one call for each token that
is not the last, with everything before it in the server's prefix cache. Prompt log-probabilities are never asked for:
servers leave their prefix cache aside for those.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlme.evaluators.endpoint_client import EndpointClient
from rlme.evaluators.endpoint_wire import (
    CallFailed,
    NextTokens,
    Usage,
    read_named_tokens,
    read_next_tokens,
    read_text,
    read_usage,
)
from rlme.judgement import Failure, Message, Request

FIRST_TOP = 1000
"""Alternatives asked for at first where a server has no limit; all of them only when a label is not among these."""
FAR_BELOW = 1e-4
"""Spellings that could add less than this share to their label's probability are not worth asking for all of them."""


@dataclass(slots=True)
class Found:
    """What came back for one request: a log-probability per continuation; `bounded` ones are upper bounds, and None
    is a continuation that nothing is known about. With the tokens used."""

    texts: tuple[str, ...]
    logprobs: list[float | None]
    bounded: list[bool]
    usage: list[Usage] = field(default_factory=list)


@dataclass
class TokenServer:
    """A server with a tokenizer route.

    `label_ids`: it gives log-probabilities of named tokens (vLLM's `logprob_token_ids`, SGLang's `token_ids_logprob`).
    `top`: alternatives it returns at most. `limit`: its longest context in tokens. `chat`: it has a chat template.
    `plain`: id of an ordinary token. `leading`: tokens that it puts before every text, asked to or not.
    """

    client: EndpointClient
    model: str
    kind: Literal["vLLM", "llama.cpp", "SGLang"]
    root: str
    chat: bool
    label_ids: bool = False
    top: int = 20
    limit: int | None = None
    plain: int | None = None
    leading: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._spelled: dict[str, tuple[int, ...]] = {}
        self._spelling = asyncio.Lock()

    def describe(self) -> str:
        """What it can do, in a few words."""
        reads = "log-probabilities of named tokens" if self.label_ids else f"the {self.top} most likely next tokens"
        chat = "chat and text" if self.chat else "text only (no chat template)"
        longest = f", contexts up to {self.limit} tokens" if self.limit else ""
        return f"{self.kind}, {chat}, labels as exact token ids, {reads}{longest}"

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text, with or without the tokens that begin every prompt."""
        if self.kind == "llama.cpp":
            body: dict[str, Any] = {"content": text, "add_special": special, "parse_special": True}
        else:
            body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        ids = (await self.client.call(f"{self.root}/tokenize", body, _token_ids))[0]
        unasked = len(self.leading) if not special and ids[: len(self.leading)] == list(self.leading) else 0
        return ids[unasked:]

    async def encode(self, context: str | tuple[Message, ...], prefill: str) -> list[int]:
        """Token ids of a whole context, as the model sees it."""
        if isinstance(context, str):
            ids = await self.tokenize(context + prefill, special=True)
            # What a chat template wrote, and is continued as text, begins with the token that begins every text.
            twice = len(ids) > 1 and ids[0] == ids[1] and await self._begins_texts(ids[0])
            return ids[1:] if twice else ids
        messages = list(context)
        if self.kind == "llama.cpp":
            url = f"{self.root}/apply-template"
            text, _ = await self.client.call(url, {"messages": messages}, _rendered)
            return await self.tokenize(text + prefill, special=True)
        body: dict[str, Any] = {"model": self.model, "messages": messages, "add_generation_prompt": not prefill}
        if prefill:
            body["messages"] = [*messages, {"role": "assistant", "content": prefill}]
            body["continue_final_message"] = True
        return (await self.client.call(f"{self.root}/tokenize", body, _token_ids))[0]

    async def _begins_texts(self, token: int) -> bool:
        """Whether the server puts this token, by itself, before a text that it is asked to begin."""
        whole, bare = await self.tokenize("a", special=True), await self.tokenize("a", special=False)
        return whole == [token, *bare]

    async def spell(self, text: str) -> tuple[int, ...]:
        """Token ids of a continuation; encoded behind a newline, so that no tokenizer puts a space before it."""
        async with self._spelling:
            if text not in self._spelled:
                before = await self.tokenize("\n", special=False)
                both = await self.tokenize("\n" + text, special=False)
                behind = both[: len(before)] == before
                self._spelled[text] = tuple(both[len(before) :] if behind else await self.tokenize(text, special=False))
        return self._spelled[text]

    async def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """The candidates without those that begin with another one's tokens."""
        spelled = [(text, await self.spell(text)) for text in dict.fromkeys(candidates)]
        kept: dict[str, tuple[int, ...]] = {}
        for text, ids in sorted(spelled, key=lambda item: len(item[1])):
            if ids and not any(ids[: len(other)] == other for other in kept.values()):
                kept[text] = ids
        return tuple(text for text, _ in spelled if text in kept)

    async def find(self, request: Request) -> Found:
        """Log-probabilities of the request's continuations. Raises `CallFailed`."""
        context = await self.encode(request.context, request.prefill)
        wanted = [await self.spell(text) for text in request.continuations]
        longest = max(map(len, wanted), default=0)
        if self.limit is not None and len(context) + longest > self.limit:
            detail = f"the context has {len(context)} tokens, the endpoint's limit is {self.limit}"
            raise CallFailed(Failure.CONTEXT_TOO_LONG, detail, passing=False)
        found = Found(request.continuations, [0.0] * len(wanted), [False] * len(wanted))
        await self._walk(context, 0, [i for i, ids in enumerate(wanted) if ids], wanted, found)
        return found

    async def size(self, request: Request) -> tuple[int, int]:
        """(calls, tokens of each) that a request takes at most: one call for every beginning its labels share, and
        another where a label is not among the first alternatives."""
        tokens = len(await self.encode(request.context, request.prefill))
        wanted = [await self.spell(text) for text in request.continuations]
        beginnings = {ids[:depth] for ids in wanted for depth in range(len(ids))}
        return len(beginnings) * (2 if self.top > FIRST_TOP else 1), tokens

    async def _walk(
        self, context: list[int], depth: int, rows: list[int], wanted: list[tuple[int, ...]], found: Found
    ) -> None:
        """Add the log-probability of token `depth` to each of `rows`, which agree on all tokens before it."""
        heads = sorted({wanted[i][depth] for i in rows})
        texts: dict[str, list[int | None]] = {}  # by label: tokens that end its spellings here; None: it goes on
        for i in rows:
            ends = len(wanted[i]) == depth + 1
            texts.setdefault(label_of(found.texts[i]), []).append(wanted[i][depth] if ends else None)
        top = await self._next(context, heads, list(texts.values()), found)
        deeper: list[tuple[int, list[int]]] = []
        for head in heads:
            mine = [i for i in rows if wanted[i][depth] == head]
            for i in mine:
                so_far = found.logprobs[i]
                if head in top.by_id and so_far is not None:
                    found.logprobs[i] = so_far + top.by_id[head]
                else:  # what follows can only make it less likely
                    found.bounded[i] = True
                    found.logprobs[i] = None if top.floor is None or so_far is None else so_far + top.floor
            further = [i for i in mine if head in top.by_id and len(wanted[i]) > depth + 1]
            if further:
                deeper.append((head, further))
        for head, further in deeper:  # one after the other: each finds the context where the last call left it
            await self._walk([*context, head], depth + 1, further, wanted, found)

    async def _next(
        self, context: list[int], heads: list[int], labels: list[list[int | None]], found: Found
    ) -> NextTokens:
        if self.kind == "SGLang":
            return await self._named(context, heads, found)
        count = min(self.top, FIRST_TOP)
        while True:
            body: dict[str, Any] = self._body(context, max_tokens=1) | {"temperature": 1.0, "logprobs": count}
            body |= self.draw_plain()
            if self.kind == "vLLM":
                body["return_tokens_as_token_ids"] = True
            if self.label_ids:
                body["logprob_token_ids"] = heads

            def read(reply: Any, asked: int = count) -> NextTokens:
                _check_length(reply, len(context))
                tokens = read_next_tokens(reply, asked=asked)
                if self.label_ids and not all(head in tokens.by_id for head in heads):
                    raise CallFailed(Failure.LABEL_MISSING, "a label that was named is not in the reply")
                return tokens

            tokens, usage = await self.client.call("/completions", body, read, tokens_in=len(context), tokens_out=1)
            found.usage.append(usage)
            if count >= self.top or all(head in tokens.by_id for head in heads) or _all_there(tokens, labels):
                return tokens
            count = self.top

    async def _named(self, context: list[int], heads: list[int], found: Found) -> NextTokens:
        """SGLang's own route gives any token's log-probability by its id."""

        def read(reply: Any) -> NextTokens:
            _check_length(reply, len(context))
            return read_named_tokens(reply, heads)

        url = f"{self.root}/generate"
        tokens, usage = await self.client.call(
            url, native_body(context, heads), read, tokens_in=len(context), tokens_out=1
        )
        found.usage.append(usage)
        return tokens

    def draw_plain(self) -> dict[str, Any]:
        """What makes llama.cpp draw an ordinary token: it reports nothing when the token it draws ends the text or is
        half a character. The log-probabilities are taken before that and do not change."""
        return {} if self.plain is None else {"logit_bias": {str(self.plain): 100}}

    async def write(self, request: Request, max_tokens: int) -> tuple[str, Usage]:
        """Greedy text after a context."""
        context = await self.encode(request.context, request.prefill)
        if self.limit is not None and len(context) + max_tokens > self.limit:
            raise CallFailed(Failure.CONTEXT_TOO_LONG, "context and answer exceed the endpoint's limit", passing=False)
        body = self._body(context, max_tokens=max_tokens) | {"temperature": 0.0}
        return await self.client.call("/completions", body, read_text, tokens_in=len(context), tokens_out=max_tokens)

    def _body(self, context: list[int], *, max_tokens: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": context, "max_tokens": max_tokens}


def native_body(context: list[int], named: list[int]) -> dict[str, Any]:
    """A call of SGLang's `/generate`. No log-probabilities of the prompt: they would bypass its prefix cache."""
    return {
        "input_ids": context,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
        "return_logprob": True,
        "logprob_start_len": -1,
        "token_ids_logprob": named,
    }


def label_of(spelling: str) -> str:
    """What spellings of one label have in common: they differ in case and outer spaces."""
    return spelling.strip().casefold()


def _all_there(top: NextTokens, labels: list[list[int | None]]) -> bool:
    """Whether the missing tokens are spellings too unlikely to matter beside those of the same label that came."""
    if top.floor is None:
        return False
    for tokens in labels:
        there = sum(math.exp(top.by_id[t]) for t in tokens if t is not None and t in top.by_id)
        missing = [t for t in tokens if t not in top.by_id]
        negligible = there > 0 and len(missing) * math.exp(top.floor) <= FAR_BELOW * there  # exp may round to 0
        if None in missing or (missing and not negligible):
            return False
    return True


def _token_ids(reply: Any) -> list[int]:
    ids = reply.get("tokens") if isinstance(reply, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CallFailed(Failure.MALFORMED, "the tokenizer's reply has no list of token ids")
    return ids


def _rendered(reply: Any) -> str:
    text = reply.get("prompt") if isinstance(reply, dict) else None
    if not isinstance(text, str):
        raise CallFailed(Failure.MALFORMED, "the chat template's reply has no text")
    return text


def _check_length(reply: Any, sent: int) -> None:
    """A server that cut the context judged something else; its numbers are not ours."""
    read = read_usage(reply).tokens_in
    if 0 < read < sent:
        detail = f"the server read {read} of {sent} context tokens"
        raise CallFailed(Failure.CONTEXT_TOO_LONG, detail, passing=False)

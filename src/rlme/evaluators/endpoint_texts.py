"""Asking a server that keeps its tokenizer to itself (hosted APIs): labels are single tokens, told apart by their text.

Without the tokenizer nobody can know how a longer label is split, and a guess would be the probability of something
else. So a label must be one token here, and be seen as such in some reply, before it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlme.errors import InputError
from rlme.evaluators.endpoint_client import EndpointClient
from rlme.evaluators.endpoint_tokens import Found
from rlme.evaluators.endpoint_wire import NextTokens, Usage, read_next_tokens, read_text
from rlme.judgement import Message, Request

CHARACTERS_PER_TOKEN = 3
"""A low guess (English has about 4), so that limits and the cost cap err on the safe side."""
BYTES_PER_TOKEN = 2
"""The same for all that is not ASCII: an accented letter is at most one token, a Chinese character may be two."""


@dataclass
class TextServer:
    """A server asked by text or messages. `top`: alternatives it returns at most; `max_tokens`: what it calls the
    length of an answer on the chat route."""

    client: EndpointClient
    model: str
    chat: bool
    completes: bool
    top: int
    max_tokens: str = "max_tokens"

    def __post_init__(self) -> None:
        self.seen: set[bytes] = set()
        """Tokens that stood in any reply."""
        self._settled: dict[str, bool] = {}

    def describe(self) -> str:
        """What it can do, in a few words."""
        routes = " and ".join([*["chat"] * self.chat, *["text"] * self.completes])
        return f"{routes}, one-token labels only, the {self.top} most likely next tokens"

    async def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """The candidates that are one token, as far as the server's replies show. Settled once, so that every
        judgement of a run asks for the same."""
        for text in candidates:
            if text not in self._settled:
                self._settled[text] = await self._is_token(text)
        return tuple(text for text in dict.fromkeys(candidates) if self._settled[text])

    async def _is_token(self, text: str) -> bool:
        if text.encode() not in self.seen:
            prompt = f"Write exactly this and nothing else: {text}"
            context: str | tuple[Message, ...] = ({"role": "user", "content": prompt},)
            if not self.chat:
                context = f"{text}\n" * 6
            await self._ask(context)
        return text.encode() in self.seen

    async def find(self, request: Request) -> Found:
        """Log-probabilities of the request's continuations. Raises `CallFailed`."""
        context = request.context
        if isinstance(context, str):
            context += request.prefill
        top, usage = await self._ask(context)
        values = [top.by_text.get(text.encode()) for text in request.continuations]
        logprobs = [top.floor if v is None else v for v in values]
        return Found(request.continuations, logprobs, [v is None for v in values], [usage])

    async def size(self, request: Request) -> tuple[int, int]:
        """(calls, tokens of each) that a request takes."""
        return 1, self._body(request.context, 1)[2]

    async def write(self, request: Request, max_tokens: int) -> tuple[str, Usage]:
        """Greedy text after a context."""
        context = request.context
        if isinstance(context, str):
            context += request.prefill
        path, body, size = self._body(context, max_tokens)
        return await self.client.call(
            path, body | {"temperature": 0.0}, read_text, tokens_in=size, tokens_out=max_tokens
        )

    def refuse(self, request: Request) -> None:
        """`InputError` for a kind of request this server has no way to answer."""
        where = f"endpoint {self.client.config.base_url}"
        if isinstance(request.context, str) and not self.completes:
            raise InputError(
                f"{where} has no completions route with log-probabilities, but the template is one of kind text: "
                "use a chat template, such as judge or chat"
            )
        if not isinstance(request.context, str) and not self.chat:
            raise InputError(
                f"{where} has no chat route with log-probabilities, but the template is a chat one: "
                "use a template of kind text, such as paper or reply"
            )
        if not isinstance(request.context, str) and request.prefill:
            raise InputError(
                f"{where} cannot continue a begun answer ({request.prefill!r}): use the read-out yes_no or scale, "
                "or a server that shares its tokenizer (vLLM, llama.cpp)"
            )

    async def _ask(self, context: str | tuple[Message, ...]) -> tuple[NextTokens, Usage]:
        path, body, size = self._body(context, 1)
        count: dict[str, Any] = {"logprobs": self.top}
        if path == "/chat/completions":
            count = {"logprobs": True, "top_logprobs": self.top}

        def read(reply: Any) -> NextTokens:
            return read_next_tokens(reply, asked=self.top)

        body |= count | {"temperature": 1.0}
        top, usage = await self.client.call(path, body, read, tokens_in=size, tokens_out=1)
        self.seen |= top.by_text.keys()
        return top, usage

    def _body(self, context: str | tuple[Message, ...], max_tokens: int) -> tuple[str, dict[str, Any], int]:
        if isinstance(context, str):
            body: dict[str, Any] = {"model": self.model, "prompt": context, "max_tokens": max_tokens}
            return "/completions", body, guessed_tokens(context)
        size = sum(guessed_tokens(m["content"]) + 4 for m in context)
        return (
            "/chat/completions",
            {"model": self.model, "messages": list(context), self.max_tokens: max_tokens},
            size,
        )


def guessed_tokens(text: str) -> int:
    """How many tokens a text may have, rather too many than too few."""
    size, plain = len(text.encode("utf-8", "surrogatepass")), len(text.encode("ascii", "ignore"))
    return 1 + plain // CHARACTERS_PER_TOKEN + (size - plain + 1) // BYTES_PER_TOKEN

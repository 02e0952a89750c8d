"""An evaluator behind an OpenAI-compatible endpoint: vLLM, llama.cpp, SGLang, hosted APIs."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from rlme.errors import RunStopped
from rlme.evaluators.endpoint_begun import Begun
from rlme.evaluators.endpoint_client import EndpointClient
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.evaluators.endpoint_limits import Account
from rlme.evaluators.endpoint_probe import probe
from rlme.evaluators.endpoint_texts import TextServer
from rlme.evaluators.endpoint_tokens import Found, label_of
from rlme.evaluators.endpoint_wire import CallFailed, Usage
from rlme.judgement import NEGLIGIBLE, Answer, Failure, Message, Request

T = TypeVar("T")


class EndpointEvaluator:
    """A served model as an `Evaluator`.

    The server is probed when this is made: `summary` says in one line what it can do, and `InputError` is raised if it
    cannot judge. Calls run concurrently on an event loop of their own; answers come in the order of the requests.

    `chat`: ask through the chat template; by default as `config.api` says, or where the server has one.
    `spent_before`: money that counts for `config.max_cost` already.
    `logprobs` raises `RunStopped` when the server stays away longer than `config.outage`, or at `config.max_cost`.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        name: str | None = None,
        chat: bool | None = None,
        max_context_tokens: int | None = None,
        spent_before: float = 0.0,
    ) -> None:
        self.config = config
        self._loop = _Loop()
        self._slots = asyncio.Semaphore(config.concurrency)
        self._answers: Begun[Answer] = Begun()
        self._texts: dict[int, Begun[str | Failure]] = defaultdict(Begun)
        self._client = EndpointClient(config)
        self._client.account.spent_before = spent_before
        try:
            self._server = self._loop.run(probe(self._client))
        except BaseException:
            self.close()
            raise
        self._client.account.failures.clear()  # what the probe was refused is no failed judgement
        self._client.account.retries = 0
        limits = [n for n in (getattr(self._server, "limit", None), max_context_tokens) if n is not None]
        if limits and not isinstance(self._server, TextServer):
            self._server.limit = min(limits)
        self.model = self._server.model
        self.name = name or self.model.rstrip("/").split("/")[-1]
        if chat is None:
            chat = config.api == "chat" or (config.api == "auto" and self._server.chat)
        self.chat = chat
        self.summary = f"{self.name} at {config.base_url}: {self._server.describe()}"

    @property
    def account(self) -> Account:
        """Calls, retries, failed attempts, tokens and money since the start."""
        return self._client.account

    @property
    def identity(self) -> str:
        """What the answers depend on besides the request: part of the judge cache's key."""
        c = self.config
        return f"endpoint:{c.base_url}:{self.model}:{c.revision}:{c.missing_label}:{sorted(c.extra_body.items())}"

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in their order whatever the timing."""
        return _result(self.start(requests))

    def start(self, requests: Sequence[Request]) -> Future[list[Answer]]:
        """As `logprobs`, without waiting."""
        self.check(requests)
        return self._loop.submit(self._in_families(requests, self._answer, self._answers))

    def begin(self, requests: Sequence[Request], *, max_tokens: int | None = None) -> None:
        """Start asking about one completion; the next `logprobs` finds the answers under way, so judging overlaps with
        the sampling of other completions. `max_tokens`: texts are to be written, for the next `write`.

        Numbers, order and failures are those of `logprobs` alone; an outage is raised there, too.
        """
        self.check(requests)
        if max_tokens is None:
            self._loop.call(self._answers.begin, requests, self._slotted(self._answer))
        else:
            self._loop.call(self._texts[max_tokens].begin, requests, self._slotted(self._writer(max_tokens)))

    def check(self, requests: Sequence[Request]) -> None:
        """`InputError`, naming the alternative, for a kind of request that this server has no way to answer."""
        if isinstance(self._server, TextServer):
            for request in requests:
                self._server.refuse(request)

    def estimate(self, requests: Sequence[Request], *, max_tokens: int | None = None) -> Usage:
        """Tokens that these requests may take, before any is sent, nothing cached; `max_tokens`: of texts to be
        written. Counted exactly where the server shares its tokenizer; otherwise guessed from the text's length, on
        the high side. Raises `ConnectionError` when the server does not count."""
        try:
            sizes = self._loop.run(_all([self._slotted(self._server.size)(request) for request in requests]))
        except CallFailed as failure:
            raise ConnectionError(f"endpoint {self.config.base_url}: {failure.detail}") from None
        if max_tokens is not None:
            return Usage(sum(tokens for _, tokens in sizes), 0, max_tokens * len(sizes))
        return Usage(sum(n * tokens for n, tokens in sizes), 0, sum(n for n, _ in sizes))

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        """Greedy text after each context."""
        self.check(requests)
        return self._loop.run(self._in_families(requests, self._writer(max_tokens), self._texts[max_tokens]))

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Those of the label spellings that this server can be asked for together."""
        try:
            return self._loop.run(self._server.spellings(candidates))
        except CallFailed as failure:
            raise ConnectionError(f"endpoint {self.config.base_url}: {failure.detail}") from None

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        """Length of a context in the model's tokens, or None where the server keeps its tokenizer to itself."""
        if isinstance(self._server, TextServer):
            return None
        try:
            return len(self._loop.run(self._server.encode(context, "")))
        except CallFailed:
            return None

    def call_off(self) -> None:
        """Ask nothing more: what is under way is cancelled, and booked at its estimate, as it may be billed."""
        if not self._loop.ended:
            self._loop.run(_cancel_others())

    def close(self) -> None:
        """Close the connections and end the event loop. A second time does nothing."""
        if not self._loop.ended:
            self._loop.run(self._client.close())
            self._loop.stop()

    async def _in_families(
        self, requests: Sequence[Request], ask: Callable[[Request], Coroutine[Any, Any, T]], begun: Begun[T]
    ) -> list[T]:
        """Results in order; `config.concurrency` families under way, the requests of each one after the other. What
        was begun already is waited for."""
        results: dict[int, T] = {}

        async def wait(i: int, task: asyncio.Task[T]) -> None:
            results[i] = await task

        async def work(family: Sequence[int]) -> None:
            async with self._slots:
                for i in family:
                    results[i] = await ask(requests[i])

        early = begun.claim(requests)
        late = [i for i, task in enumerate(early) if task is None]
        found = families([requests[i] for i in late], self.config.concurrency)
        begun_before = [wait(i, task) for i, task in enumerate(early) if task is not None]
        try:
            await _all(begun_before + [work([late[i] for i in family]) for family in found])
        except BaseExceptionGroup as group:
            if isinstance(stop := group.exceptions[0], RunStopped):
                raise RunStopped(str(stop), answered=results) from None
            raise
        return [results[i] for i in range(len(requests))]

    def _slotted(self, ask: Callable[[Request], Coroutine[Any, Any, T]]) -> Callable[[Request], Coroutine[Any, Any, T]]:
        async def slotted(request: Request) -> T:
            async with self._slots:
                return await ask(request)

        return slotted

    async def _answer(self, request: Request) -> Answer:
        try:
            found = await self._server.find(request)
        except CallFailed as failure:
            return Answer.failed(failure.kind, failure.detail)
        return settle(request, found, self.config)

    def _writer(self, max_tokens: int) -> Callable[[Request], Coroutine[Any, Any, str | Failure]]:
        async def text(request: Request) -> str | Failure:
            try:
                return (await self._server.write(request, max_tokens))[0]
            except CallFailed as failure:
                return failure.kind

        return text


def families(requests: Sequence[Request], concurrency: int) -> list[list[int]]:
    """Neighbours that share at least half of their text, asked one after the other so that each finds the server's
    prefix cache filled by the one before. Small enough that `concurrency` of them are always under way."""
    largest = max(1, len(requests) // (4 * concurrency))
    result: list[list[int]] = []
    last = ""
    for i, request in enumerate(requests):
        context = request.context
        text = context if isinstance(context, str) else "".join(turn["content"] for turn in context)
        related = last.startswith(text[: (len(text) + 1) // 2])
        if result and related and len(result[-1]) < largest:
            result[-1].append(i)
        else:
            result.append([i])
        last = text
    return result


def settle(request: Request, found: Found, config: EndpointConfig) -> Answer:
    """One answer from what came back; labels that did not come back are failures or bounds, never numbers.

    Spellings of one label (equal but for case and outer spaces) stand in for each other: those missing are left at
    their upper bound if together they could change their label's probability by less than 1 %.
    """
    usage = Usage(
        sum(u.tokens_in for u in found.usage),
        sum(u.tokens_cached for u in found.usage),
        sum(u.tokens_out for u in found.usage),
    )
    spent: dict[str, Any] = {
        "tokens_in": usage.tokens_in,
        "tokens_cached": usage.tokens_cached,
        "tokens_out": usage.tokens_out,
        "cost": config.prices.cost(usage.tokens_in, usage.tokens_cached, usage.tokens_out),
    }
    labels: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(request.continuations):
        labels[label_of(text)].append(i)
    for rows in labels.values():
        there = math.fsum(math.exp(lp) for i in rows if (lp := found.logprobs[i]) is not None and not found.bounded[i])
        missing = [found.logprobs[i] for i in rows if found.bounded[i]]
        at_most = math.fsum(math.inf if lp is None else math.exp(lp) for lp in missing)
        unknown = any(lp is None for lp in missing) or not (there or at_most)  # so small that exp makes 0 of it
        negligible = at_most <= NEGLIGIBLE * there
        if missing and (unknown or (config.missing_label == "fail" and not negligible)):
            text = next(request.continuations[i] for i in rows if found.bounded[i])
            detail = f"{text!r} is not among the log-probabilities that the server returned"
            return Answer(None, Failure.LABEL_MISSING, detail, **spent)
    logprobs = tuple(lp for lp in found.logprobs if lp is not None)
    return Answer(logprobs, bounded=tuple(found.bounded) if any(found.bounded) else (), **spent)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _all(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first exception (a stop, not a failed judgement) cancels the rest."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


def _result(future: Future[T]) -> T:
    """The future's result. Ctrl-C while waiting cancels the calls: nothing is asked, or paid for, behind one's back."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class _Loop:
    """An event loop on a thread of its own, so that callers need not be asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlme-endpoint", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start something; its exception, if any, is raised by the future as itself."""
        return asyncio.run_coroutine_threadsafe(_unwrapped(work), self._loop)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call something on the loop, without waiting."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something to its end."""
        return _result(self.submit(work))

    @property
    def ended(self) -> bool:
        """Whether it was stopped."""
        return self._loop.is_closed()

    def stop(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _unwrapped(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    except BaseExceptionGroup as group:  # a task group wraps what stopped it; all its tasks stop for the same reason
        raise group.exceptions[0] from None

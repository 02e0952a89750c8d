"""One call to an OpenAI-compatible server: paced, bounded in time, retried while that can help, accounted for."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rlme.errors import InputError, RunStopped
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.evaluators.endpoint_limits import Account, Gate, Notice, Outage, Pace
from rlme.evaluators.endpoint_wire import CallFailed, Usage, read_usage
from rlme.judgement import Failure

Reply = TypeVar("Reply")

FIRST_PAUSE = 0.5
"""Seconds before the first retry; doubled each time up to `LONGEST_PAUSE`, with jitter."""
LONGEST_PAUSE = 30.0
_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|maximum context|too long|too many tokens|longer than the model", re.I
)


class EndpointClient:
    """Calls for one endpoint. All methods run on one event loop."""

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai
        except ImportError:
            raise InputError(
                "an evaluator with `endpoint` needs the openai package: pip install 'rlme[endpoints]'"
            ) from None
        self.config = config
        self._openai = openai
        self.account = Account(config.prices, config.max_cost)
        self.health_body: tuple[str, dict[str, Any]] | None = None
        """Path and body of the cheapest real call, known once the server was probed."""
        # Everything the client would read from the environment by itself is given here, so that no key of
        # another service is ever sent to this one.
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=_key(config),
            organization="",
            project="",
            max_retries=0,
            timeout=config.deadline,
        )
        self._requests = Pace(config.requests_per_minute)
        self._tokens = Pace(config.tokens_per_minute)
        self._gate = Gate()
        self._notice = Notice(config.base_url)
        self._outage = Outage(self._healthy, config.outage, gate=self._gate, notice=self._notice)
        self._answered = -math.inf  # when the model last did

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def call(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Reply],
        *,
        tokens_in: int = 0,
        tokens_out: int = 0,
    ) -> tuple[Reply, Usage]:
        """POST `body` (None: GET) until `read` accepts the reply; returns what it read and the tokens of that attempt.

        `tokens_in` and `tokens_out` are an estimate for limits and cap; a call without tokens (tokenising) is free of
        both. Raises `CallFailed` when no attempt helped, `RunStopped` at an outage longer than the budget or at the
        cost cap.
        """
        failed, limited, limited_since = 0, 0, 0.0
        began, doubted = time.monotonic(), False
        while True:
            answered_others = self._answered > began
            try:
                reply = await self._attempt(path, body, read, tokens_in, tokens_out)
                if tokens_in + tokens_out:  # tokenising may work while the model does not
                    self._answered = time.monotonic()
                return reply
            except CallFailed as failure:
                self.account.failures[failure.kind] += 1
                if not failure.passing:
                    raise
                self._give_up_at_long_waits(failure)
                if failure.kind is Failure.RATE_LIMITED:  # a limit is waited out; attempts do not count
                    limited_since = limited_since if limited else time.monotonic()
                    limited += 1
                    spent = time.monotonic() - limited_since >= self.config.outage
                else:
                    failed += 1
                    spent = failed > self.config.retries
                if spent:
                    # Before the probe is through there is no way to tell an outage from a wrong address.
                    if self.health_body is None:
                        raise
                    if not await self._outage.over():
                        # It may have come back this moment: unless it answered others before, one attempt more.
                        if doubted or answered_others or not self.config.retries:
                            raise
                        doubted = True
                        self.account.retries += 1
                        continue
                    failed = limited = 0
                self.account.retries += 1
                await self._pause(limited if failure.kind is Failure.RATE_LIMITED else failed, failure)

    def _give_up_at_long_waits(self, failure: CallFailed) -> None:
        if failure.fatal:
            raise RunStopped(f"the evaluator's endpoint refuses to go on: {failure.detail}") from None
        if failure.retry_after is not None and failure.retry_after > self.config.outage:
            raise RunStopped(
                f"the evaluator's endpoint asks to wait {failure.retry_after:.0f} s, longer than `outage` "
                f"({self.config.outage:.0f} s): {failure.detail}"
            ) from None

    async def _attempt(
        self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Reply], tokens_in: int, tokens_out: int
    ) -> tuple[Reply, Usage]:
        estimate = tokens_in + tokens_out
        await self._gate.passed()
        if not estimate:
            return read(await self._send(path, body)), Usage()
        reserved = self.account.reserve(tokens_in, tokens_out)
        usage = Usage()
        try:
            await self._turn(estimate)
            self.account.calls += 1
            # What was expected is taken for spent where nothing is told: the reply is late, cannot be read, does not
            # count, or is not waited for.
            try:
                reply = await self._send(path, body)
            except asyncio.CancelledError:  # called off, and perhaps billed all the same
                usage = Usage(tokens_in, 0, tokens_out)
                raise
            except CallFailed as failure:
                if failure.kind in (Failure.TIMEOUT, Failure.MALFORMED):
                    usage = Usage(tokens_in, 0, tokens_out)
                raise
            told = read_usage(reply)
            usage = Usage(told.tokens_in or tokens_in, told.tokens_cached, told.tokens_out or tokens_out)
            return read(reply), usage
        finally:
            self.account.settle(reserved, usage)
            if usage.tokens_in:
                self._tokens.correct(usage.tokens_in + usage.tokens_out - estimate)

    async def _turn(self, tokens: int) -> None:
        """Wait for a place and an open gate. A place that comes up while the gate is closed is lost, so that those who
        waited do not all go when it opens."""
        while True:
            await self._gate.passed()
            await self._requests.take()
            await self._tokens.take(tokens)
            if not self._gate.closed:
                return

    async def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """One request on the wire; returns the decoded JSON."""
        openai = self._openai
        try:
            async with asyncio.timeout(self.config.deadline):  # the client's own timeout is per chunk, not per call
                if body is None:
                    reply = await self._client.get(path, cast_to=object)
                else:
                    reply = await self._client.post(path, cast_to=object, body=self.config.extra_body | body)
                # The client leaves a reply with another content type as text; JSON is JSON whatever it is called.
                return json.loads(reply) if isinstance(reply, str) else reply
        except (openai.APITimeoutError, TimeoutError):
            raise CallFailed(Failure.TIMEOUT, f"no complete reply within {self.config.deadline:g} s") from None
        except openai.APIStatusError as error:
            raise _status_failure(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise CallFailed(Failure.CONNECTION, f"{type(cause).__name__}: {cause}"[:300]) from None
        except UnicodeEncodeError:
            detail = "the text holds half a character (a lone surrogate), which no request can carry"
            raise CallFailed(Failure.REFUSED, detail, passing=False) from None
        except (ValueError, RecursionError) as error:
            raise CallFailed(Failure.MALFORMED, f"the reply is not JSON ({error})"[:300]) from None

    async def _healthy(self) -> bool:
        if self.health_body is None:
            return False
        path, body = self.health_body
        try:
            await self._send(path, body)
        except CallFailed:
            return False
        return True

    async def _pause(self, failed: int, failure: CallFailed) -> None:
        """Back off; longer where the server asks for it, never shorter."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failed - 1, 10)) if failed else FIRST_PAUSE
        wait = random.uniform(0.5, 1.0) * longest
        if failure.retry_after is not None:
            self._gate.close_for(failure.retry_after)
            wait = max(wait, random.uniform(1.0, 1.1) * failure.retry_after)
        if failure.retry_after is not None or failure.kind is Failure.RATE_LIMITED:
            self._notice.waiting(f"the server asks to slow down ({failure.detail})", wait)
        await asyncio.sleep(wait)


def _key(config: EndpointConfig) -> str:
    if config.api_key_env is None:
        return "none"
    key = os.environ.get(config.api_key_env, "").strip()
    named = f"evaluator endpoint {config.base_url}: api_key_env names the environment variable {config.api_key_env!r}, "
    if not key:
        raise InputError(named + "which is not set")
    if not (key.isascii() and key.isprintable()):  # refused here: the HTTP client's own complaint shows the key
        raise InputError(named + "whose value has characters that no HTTP header may hold")
    return key


def _status_failure(error: Any) -> CallFailed:
    status = int(error.status_code)
    body = error.body if isinstance(error.body, dict) else {}
    detail = f"HTTP {status}: {_said(error)}"[:300]
    wait = _retry_after(error.response.headers)
    if status in (402, 429):  # 402 is payment required
        spent = status == 402 or "insufficient_quota" in (body.get("code"), body.get("type"))
        return CallFailed(Failure.RATE_LIMITED, detail, fatal=spent, retry_after=wait, status=status)
    if status in (408, 504):
        return CallFailed(Failure.TIMEOUT, detail, status=status)
    if status >= 500:  # a 503 may say when to come back, too
        return CallFailed(Failure.SERVER_ERROR, detail, retry_after=wait, status=status)
    if status in (409, 425):  # a conflict with another call, or too early: both pass
        return CallFailed(Failure.REFUSED, detail, retry_after=wait, status=status)
    too_long = status == 413 or body.get("code") == "context_length_exceeded" or _TOO_LONG.search(detail) is not None
    kind = Failure.CONTEXT_TOO_LONG if too_long else Failure.REFUSED
    return CallFailed(kind, detail, passing=False, status=status)


def _said(error: Any) -> str:
    """The server's own words, in whichever field it puts them."""
    said = error.body
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail") or said
    return str(said or error.message)


def _retry_after(headers: Any) -> float | None:
    """Seconds from `Retry-After` (a number or an HTTP date) or `retry-after-ms`; None where absent or unreadable."""
    try:
        if (ms := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(ms) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if (date := email.utils.parsedate_to_datetime(value) if not _number(value) else None) is not None:
            return max(0.0, date.timestamp() - time.time())
        seconds = float(value)
        return max(0.0, seconds) if seconds == seconds else None
    except (ValueError, TypeError):
        return None


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""What every request passes: the bearer token, the limit of its body, the count of its answer.

Who hangs up is noticed here too, and the work on the request is cancelled: what nobody waits for need not be judged.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health", "/docs", "/openapi.json")
"""Routes without a token."""
COUNTED = ("/score", "/openrlhf")
DRAIN = 0.5
"""Seconds in which a refused body may still arrive."""
HUNG_UP = 499
"""The status under which a request is counted whose client did not wait for the answer."""


class Gate:
    """Refuses requests without the token (401, before the body is read) and bodies over `limit` bytes (413, whether or
    not their length was announced); calls `answered` with status and seconds."""

    def __init__(self, app: ASGIApp, *, token: str | None, limit: int, answered: Callable[[int, float], None]) -> None:
        self.app = app
        self.expected = None if token is None else f"Bearer {token}".encode()
        self.limit = limit
        self.answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except asyncio.CancelledError:  # the server stops, and its time for that is over
            if not status:
                await _refuse(503, "the server is stopping")(scope, receive, watched)
        except Exception:
            status = status or 500
            raise
        finally:
            if scope["path"] in COUNTED:
                self.answered(status or HUNG_UP, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        expected = None if scope["path"] in OPEN else self.expected
        if expected is not None and not secrets.compare_digest(headers.get(b"authorization", b""), expected):
            refusal = _refuse(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})
            await _drain(receive)
            return await refusal(scope, receive, send)
        too_large = _refuse(413, f"the body is larger than {self.limit} bytes")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            await _drain(receive)
            return await too_large(scope, receive, send)
        # The routes read the whole body anyway; reading it here keeps their own errors apart from this one.
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client hung up
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                if more:
                    await _drain(receive)
                return await too_large(scope, receive, send)
        return await self._answer(scope, bytes(body), receive, send)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        sent = False
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}
        hang_up = asyncio.ensure_future(receive())  # all that can come after the body

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                await asyncio.wait([hang_up])
                return {"type": "http.disconnect"}
            message, whole = whole, None
            return message

        async def watched(message: Message) -> None:
            nonlocal sent
            sent = sent or message["type"] == "http.response.start"
            await send(message)

        answering = asyncio.ensure_future(self.app(scope, replay, watched))
        try:
            await asyncio.wait([answering, hang_up], return_when=asyncio.FIRST_COMPLETED)
            if sent or answering.done():
                await answering
        finally:
            for task in (answering, hang_up):
                task.cancel()
            await asyncio.wait([answering, hang_up])


async def _drain(receive: Receive) -> None:
    """Throw away what the client sends, for a moment: a connection closed with bytes unread is reset, and the client
    would not come to read why."""

    async def rest() -> None:
        while (await receive()).get("more_body", False):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), DRAIN)


def _refuse(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers={"Connection": "close", **(headers or {})})

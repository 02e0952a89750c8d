"""The HTTP application: routes, limits, and the bearer token."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.requests import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlme import __version__
from rlme.errors import InputError, RunStopped
from rlme.serve.batcher import Batcher, QueueFull, Row
from rlme.serve.metrics import Metrics
from rlme.serve.schema import Item, ItemReply, OpenRLHFReply, OpenRLHFRequest, ScoreReply, ScoreRequest

MAX_BODY = 16 << 20
"""Bytes of a request's body."""
_ENDINGS = re.compile(r"(?:\s*(?:<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>))+\s*$")
Score = Callable[[Sequence[Item]], list[Row]]


def create_app(
    scorers: Sequence[Score],
    *,
    token: str | None = None,
    description: str = "",
    max_body: int = MAX_BODY,
    max_batch: int = 256,
    max_waiting: int = 4096,
) -> FastAPI:
    """The application over `scorers`, one per worker thread (see `batcher.scorer`).

    `token`: required as `Authorization: Bearer ...` on every route but /health and the documentation.
    """
    metrics = Metrics()

    def on_batch(items: int, seconds: float) -> None:
        metrics.batch.observe(items)
        metrics.batch_seconds.observe(seconds)

    batcher = Batcher(scorers, max_batch=max_batch, max_waiting=max_waiting, on_batch=on_batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="rlme reward server", version=__version__, description=description, lifespan=lifespan)
    app.state.batcher = batcher
    app.state.metrics = metrics

    async def judged(items: Sequence[Item]) -> list[Row]:
        try:
            rows = await asyncio.wrap_future(batcher.submit(items))
        except QueueFull:
            message = f"{batcher.waiting} completions are waiting, {max_waiting} is the limit"
            raise HTTPException(503, message, headers={"Retry-After": "1"}) from None
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except RunStopped as error:  # an evaluator's outage or cost cap; this server goes on
            raise HTTPException(503, str(error), headers={"Retry-After": "30"}) from None
        metrics.judged(rows)
        return rows

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server takes requests."""
        return {"status": "ok", "waiting": batcher.waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_text() -> Response:
        """Counters for Prometheus."""
        metrics.waiting.set(batcher.waiting)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/score")
    async def score(request: ScoreRequest) -> ScoreReply:
        """Rewards of a batch of completions, with every judgement. A reward that could not be had is null."""
        rows = await judged(request.items)
        results = [ItemReply.model_validate(row) for row in rows]
        return ScoreReply(results=results, missing=sum(r.reward is None for r in results))

    @app.post("/openrlhf")
    async def openrlhf(request: OpenRLHFRequest) -> OpenRLHFReply:
        """For OpenRLHF's `--reward.remote_url`. It knows no missing rewards, so one of them fails the request (503):
        the trainer asks again, and stops if that does not help. It is never told a number instead."""
        rows = await judged(_openrlhf_items(request))
        rewards = [row["reward"] for row in rows]
        if any(reward is None for reward in rewards):
            kinds = sorted({j["failure"] for row in rows for j in row["judgements"] if j["failure"]})
            raise HTTPException(503, f"no reward: {', '.join(kinds)}", headers={"Retry-After": "1"})
        logs: dict[str, list[float]] = {}
        for row in rows:
            for j in row["judgements"]:
                if j["probability"] is not None and j["weight"]:
                    logs.setdefault(f"{j['evaluator']}/{j['question']}", []).append(j["probability"])
        return OpenRLHFReply(rewards=rewards, scores=rewards, extra_logs=logs)

    @app.middleware("http")
    async def watched(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        open_ = request.url.path in ("/health", "/docs", "/openapi.json")
        if token is not None and not open_ and not _authorised(request, token):
            response: Response = JSONResponse(
                {"detail": "a bearer token is required"}, 401, headers={"WWW-Authenticate": "Bearer"}
            )
        else:
            response = await call_next(request)
        if request.url.path in ("/score", "/openrlhf"):
            metrics.requests.labels(str(response.status_code)).inc()
            metrics.latency.observe(time.perf_counter() - began)
        return response

    app.add_middleware(BodyLimit, limit=max_body)
    return app


def _authorised(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return secrets.compare_digest(given.encode(), f"Bearer {token}".encode())


def _openrlhf_items(request: OpenRLHFRequest) -> list[Item]:
    """Queries are prompt and completion in one text, with the special tokens of the tokenizer."""
    labels = request.labels or [None] * len(request.query)
    if not len(request.query) == len(request.prompts) == len(labels):
        raise HTTPException(422, "query, prompts and labels have different lengths")
    items = []
    for query, prompt, label in zip(request.query, request.prompts, labels, strict=True):
        begin = query.find(prompt)
        if begin < 0:
            raise HTTPException(422, "a query does not contain its prompt, so the completion cannot be told from it")
        completion = _ENDINGS.sub("", query[begin + len(prompt) :])
        items.append(Item(prompt=prompt, completion=completion, answer=None if label is None else str(label)))
    return items


class BodyLimit:
    """Refuses bodies over `limit` bytes with 413, whether or not their length was announced."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if length.isdigit() and int(length) > self.limit:
            return await self._refuse(scope, receive, send)
        # The routes read the whole body anyway; reading it here keeps their own errors apart from this one.
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client hung up
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                return await self._refuse(scope, receive, send)
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message if message is not None else await receive()

        return await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"the body is larger than {self.limit} bytes"
        await JSONResponse({"detail": detail}, 413, headers={"Connection": "close"})(scope, receive, send)

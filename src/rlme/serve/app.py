"""The HTTP application and its routes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, Response

from rlme import __version__
from rlme.adapters.client import known
from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.serve.batcher import Batcher, QueueFull, Row
from rlme.serve.gate import Gate
from rlme.serve.metrics import Metrics
from rlme.serve.schema import Item, ItemReply, OpenRLHFReply, OpenRLHFRequest, ScoreReply, ScoreRequest

MAX_BODY = 16 << 20
"""Bytes of a request's body."""
_ENDINGS = re.compile(r"(?:\s*(?:<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</s>|<eos>|<pad>|<turn\|>|<end_of_turn>))+\s*$")
LAST = 1.0
"""Seconds for the worker threads to end. By now every request is answered, so what still runs is of no use."""
Score = Callable[[Sequence[Item]], list[Row]]


def create_app(
    scorers: Sequence[Score],
    *,
    evaluators: Sequence[Evaluator] = (),
    token: str | None = None,
    description: str = "",
    max_body: int = MAX_BODY,
    max_batch: int = 256,
    max_waiting: int = 4096,
) -> FastAPI:
    """The application over `scorers`, one per worker thread (see `batcher.scorer`).

    `evaluators`: those of `scorers`; what they account for themselves is what /metrics counts as spent.
    `token`: required as `Authorization: Bearer ...` on every route but /health and the documentation.
    """
    metrics = Metrics(evaluators)

    def on_batch(items: int, seconds: float) -> None:
        metrics.batch.observe(items)
        metrics.batch_seconds.observe(seconds)

    batcher = Batcher(scorers, max_batch=max_batch, max_waiting=max_waiting, on_batch=on_batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, LAST)

    app = FastAPI(title="rlme reward server", version=__version__, description=description, lifespan=lifespan)
    app.state.batcher = batcher
    app.state.metrics = metrics

    async def judged(items: Sequence[Item]) -> list[Row]:
        parts: list[asyncio.Future[list[Row]]] = []
        try:
            parts += map(asyncio.wrap_future, batcher.submit(items))
            rows = [row for part in await asyncio.gather(*parts) for row in part]
        except QueueFull:
            message = f"{batcher.waiting} completions are waiting, {max_waiting} is the limit"
            raise HTTPException(503, message, headers={"Retry-After": "1"}) from None
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except RunStopped as error:  # an evaluator's outage or cost cap; this server goes on
            raise HTTPException(503, str(error), headers={"Retry-After": "30"}) from None
        finally:  # one part failed, or the client hung up: the rest need not be judged
            for part in parts:
                part.cancel()
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
            why = ", ".join(kinds) or "no known answer"
            raise HTTPException(503, f"no reward: {why}", headers={"Retry-After": "1"})
        logs: dict[str, list[float]] = {}
        for row in rows:
            for j in row["judgements"]:
                if j["probability"] is not None and j["weight"]:
                    logs.setdefault(f"{j['evaluator']}/{j['question']}", []).append(j["probability"])
        return OpenRLHFReply(rewards=rewards, scores=rewards, extra_logs=logs)

    app.add_middleware(Gate, token=token, limit=max_body, answered=metrics.answered)
    return app


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
        items.append(Item(prompt=prompt, completion=completion, answer=known(label)))
    return items

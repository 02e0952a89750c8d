"""Requests begun before anybody waits for their answers: judging that overlaps with sampling."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from rlme.judgement import Request

T = TypeVar("T")


class Begun(Generic[T]):
    """Answers under way, found again by what was asked. All methods run on one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, list[asyncio.Task[T]]] = defaultdict(list)

    def begin(self, requests: Sequence[Request], ask: Callable[[Request], Coroutine[Any, Any, T]]) -> None:
        """Ask these one after the other, so that each finds the server's prefix cache filled by the one before."""
        before: asyncio.Task[T] | None = None
        for request in requests:
            before = asyncio.create_task(_after(before, request, ask))
            before.add_done_callback(_retrieved)
            self._tasks[_key(request)].append(before)

    def claim(self, requests: Sequence[Request]) -> list[asyncio.Task[T] | None]:
        """The task of each request that was begun, each task once. What was begun in vain is called off: nothing is
        asked, or paid for, that nobody waits for."""
        tasks, self._tasks = self._tasks, defaultdict(list)
        claimed = [begun.pop(0) if (begun := tasks.get(_key(request))) else None for request in requests]
        for rest in tasks.values():
            for task in rest:
                task.cancel()
        return claimed


async def _after(
    before: asyncio.Task[T] | None, request: Request, ask: Callable[[Request], Coroutine[Any, Any, T]]
) -> T:
    if before is not None:
        await asyncio.wait([before])  # whatever became of it
    return await ask(request)


def _retrieved(task: asyncio.Task[Any]) -> None:
    """An exception is raised by whoever claims the task; of a task that nobody claims it says nothing."""
    if not task.cancelled():
        task.exception()


def _key(request: Request) -> str:
    return json.dumps([request.context, request.prefill, request.continuations], sort_keys=True)

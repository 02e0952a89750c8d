"""Requests that arrive together are judged together.

A worker thread takes what is waiting and judges it in one batch; what arrives meanwhile is the next batch. So under
load batches grow by themselves, and a lone request waits `LINGER` at most.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlme.errors import InputError, RunStopped
from rlme.serve.schema import Item

Row = dict[str, Any]
LINGER = 0.005
"""Seconds a batch waits for company."""


class QueueFull(Exception):
    """More completions wait than the server is willing to hold."""


@dataclass(slots=True)
class _Job:
    items: Sequence[Item]
    result: Future[list[Row]] = field(default_factory=Future)


class Batcher:
    """Judges items on worker threads, each with its own `score` function, at most `max_batch` items at a time."""

    def __init__(
        self,
        scorers: Sequence[Callable[[Sequence[Item]], list[Row]]],
        *,
        max_batch: int = 256,
        max_waiting: int = 4096,
        on_batch: Callable[[int, float], None] = lambda items, seconds: None,
    ) -> None:
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.waiting = 0
        """Items taken in and not yet answered."""
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(score,), name=f"rlme-serve-{i}", daemon=True)
            for i, score in enumerate(scorers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item]) -> list[Future[list[Row]]]:
        """One row per item, later, in parts that fit a batch. A part that is cancelled before its turn is not judged.
        Raises `QueueFull`."""
        jobs = [_Job(items[i : i + self.max_batch]) for i in range(0, len(items), self.max_batch)]
        with self._changed:
            if self.waiting and self.waiting + len(items) > self.max_waiting:
                raise QueueFull
            self.waiting += len(items)
            self._jobs += jobs
            self._changed.notify_all()
        for job in jobs:
            job.result.add_done_callback(partial(self._leave, len(job.items)))
        return [job.result for job in jobs]

    def _leave(self, n: int, _: Future[list[Row]]) -> None:
        with self._changed:
            self.waiting -= n

    def close(self, limit: float | None = None) -> None:
        """Finish what was taken in, then end the threads; who is not done after `limit` seconds is left behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = None if limit is None else time.monotonic() + limit
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def _work(self, score: Callable[[Sequence[Item]], list[Row]]) -> None:
        while (jobs := self._take()) is not None:
            if jobs:
                self._judge(score, jobs)

    def _take(self) -> list[_Job] | None:
        """The next batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            self._changed.wait_for(self._full, LINGER)
            jobs: list[_Job] = []
            room = self.max_batch
            while self._jobs and len(self._jobs[0].items) <= room:
                job = self._jobs.popleft()
                if job.result.set_running_or_notify_cancel():  # a client that hung up meanwhile costs no judgement
                    jobs.append(job)
                    room -= len(job.items)
            return jobs

    def _full(self) -> bool:
        return self._closed or sum(len(job.items) for job in self._jobs) >= self.max_batch

    def _judge(self, score: Callable[[Sequence[Item]], list[Row]], jobs: Sequence[_Job]) -> None:
        began = time.monotonic()
        try:
            rows = score([item for job in jobs for item in job.items])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
                return
            stopped = 0
            for job in jobs:  # one request's mistake is not the others'
                try:
                    if stopped > 1:  # an outage or a cap is everybody's: nobody else waits for it, or pays
                        raise error
                    job.result.set_result(score(job.items))
                    stopped = 0
                except Exception as own:
                    job.result.set_exception(own)
                    error, stopped = own, stopped + 1 if isinstance(own, RunStopped) else 0
            return
        at = 0
        for job in jobs:
            job.result.set_result(rows[at : at + len(job.items)])
            at += len(job.items)
        self._on_batch(at, time.monotonic() - began)


def scorer(reward: Any) -> Callable[[Sequence[Item]], list[Row]]:
    """A `MetaReward` as a function over items. Items with different columns are judged apart: a column that one of
    them lacks is missing in its template, not empty."""

    def score(items: Sequence[Item]) -> list[Row]:
        if reward.answer is None and any(item.anchored for item in items):
            raise InputError("`anchored` needs known answers: set data.answer in the server's configuration")
        rows: list[Row | None] = [None] * len(items)
        groups: dict[frozenset[str], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(frozenset(item.columns), []).append(i)
        for names, members in groups.items():
            some = [items[i] for i in members]
            reward.score(
                [i.prompt if isinstance(i.prompt, str) else [m.model_dump() for m in i.prompt] for i in some],
                [i.completion for i in some],
                columns={name: [i.columns[name] for i in some] for name in names}
                | {"anchored": [i.anchored for i in some]}
                | ({"gold": [i.answer for i in some]} if reward.answer else {}),
                enforce_failure_rate=False,
            )
            for i, row in zip(members, reward.rows, strict=True):
                rows[i] = row
        return [row for row in rows if row is not None]

    return score

"""Requests that arrive together are judged together.

A worker thread takes what is waiting and judges it in one batch; what arrives meanwhile is the next batch. So under
load batches grow by themselves, and a lone request waits `LINGER` at most.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlme.errors import InputError
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
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(score,), name=f"rlme-serve-{i}", daemon=True)
            for i, score in enumerate(scorers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item]) -> Future[list[Row]]:
        """One row per item, later. Raises `QueueFull`."""
        with self._lock:
            if self.waiting and self.waiting + len(items) > self.max_waiting:
                raise QueueFull
            self.waiting += len(items)
        job = _Job(items)
        job.result.add_done_callback(lambda _: self._leave(len(items)))
        self._jobs.put(job)
        return job.result

    def _leave(self, n: int) -> None:
        with self._lock:
            self.waiting -= n

    def close(self) -> None:
        """Finish what was taken in, then end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, score: Callable[[Sequence[Item]], list[Row]]) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, stop = self._gather(first)
            self._judge(score, jobs)
            if stop:
                return

    def _gather(self, first: _Job) -> tuple[list[_Job], bool]:
        jobs, size, until = [first], len(first.items), time.monotonic() + LINGER
        while size < self.max_batch:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            size += len(job.items)
        return jobs, False

    def _judge(self, score: Callable[[Sequence[Item]], list[Row]], jobs: Sequence[_Job]) -> None:
        # A client that hung up while waiting costs no judgement.
        alive = [job for job in jobs if job.result.set_running_or_notify_cancel()]
        if not alive:
            return
        began = time.monotonic()
        try:
            rows = score([item for job in alive for item in job.items])
        except Exception as error:
            if len(alive) == 1:
                alive[0].result.set_exception(error)
                return
            for job in alive:  # one request's mistake is not the others'
                try:
                    job.result.set_result(score(job.items))
                except Exception as own:
                    job.result.set_exception(own)
            return
        at = 0
        for job in alive:
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

"""What a client owes its server and its user's purse: pace, waiting, and an account of what was spent."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rlme.errors import RunStopped
from rlme.evaluators.endpoint_config import Prices
from rlme.evaluators.endpoint_wire import Usage
from rlme.judgement import Failure

LONG_WAIT = 5.0
"""Seconds of waiting that are worth a line."""


class Pace:
    """Lets `amount`s through evenly, at most `per_minute` in any minute. None: no limit.

    Even spacing instead of a burst each minute: servers count minutes differently, and no window of theirs is exceeded.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def take(self, amount: float = 1.0) -> None:
        """Wait for a place of this size."""
        if not self.seconds_each:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + amount * self.seconds_each
        await asyncio.sleep(start - now)

    def correct(self, amount: float) -> None:
        """Book the difference between what was taken and what it turned out to be (may be negative)."""
        self._free_at += amount * self.seconds_each


class Gate:
    """A moment before which no call may start: how a server's Retry-After holds back all calls, not only one."""

    def __init__(self) -> None:
        self._opens_at = 0.0

    @property
    def closed(self) -> bool:
        """Whether a call would have to wait."""
        return self._opens_at > time.monotonic()

    def close_for(self, seconds: float) -> None:
        """Hold calls back for so long (an earlier, longer hold stays)."""
        self._opens_at = max(self._opens_at, time.monotonic() + seconds)

    async def passed(self) -> None:
        """Wait until the gate is open."""
        while (wait := self._opens_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)


class Notice:
    """Says that the run waits, and why: one line for a wait of more than `LONG_WAIT` seconds, no second one while it
    lasts."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._until = 0.0

    def waiting(self, why: str, seconds: float) -> None:
        """A wait of at most so many seconds begins."""
        if seconds > LONG_WAIT and time.monotonic() >= self._until:
            self._until = time.monotonic() + seconds
            sys.stderr.write(
                f"endpoint {self._where}: {' '.join(why.split())}; waiting for it, {seconds:.0f} s at most\n"
            )

    def over(self) -> None:
        """The wait has ended before its time."""
        self._until = 0.0


@dataclass
class Account:
    """What an endpoint was asked and what it cost, since it was made."""

    prices: Prices
    max_cost: float | None = None
    calls: int = 0
    retries: int = 0
    failures: Counter[Failure] = field(default_factory=Counter)
    """Failed attempts by kind, whether or not a later attempt succeeded."""
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    spent_before: float = 0.0
    """Money from before the run was resumed: it counts for `max_cost` and for nothing else here."""
    _reserved: float = 0.0

    def reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Set aside what a call may cost; `RunStopped` if that could go over `max_cost`."""
        money = self.prices.cost(tokens_in, 0, tokens_out)
        spent = self.spent_before + self.cost
        if self.max_cost is not None and spent + self._reserved + money > self.max_cost:
            raise RunStopped(
                f"the evaluator's cost has reached max_cost: {spent:.4g} spent of {self.max_cost:.4g}, and the "
                "next call could exceed it; to go on, raise the evaluator's endpoint.max_cost"
            )
        self._reserved += money
        return money

    def settle(self, reserved: float, usage: Usage) -> float:
        """Give the reservation back and book what the call did use; returns its cost."""
        self._reserved = max(0.0, self._reserved - reserved)
        cost = self.prices.cost(usage.tokens_in, usage.tokens_cached, usage.tokens_out)
        self.tokens_in += usage.tokens_in
        self.tokens_cached += usage.tokens_cached
        self.tokens_out += usage.tokens_out
        self.cost += cost
        return cost

    @property
    def left(self) -> float:
        """Money that may still be spent."""
        return math.inf if self.max_cost is None else max(0.0, self.max_cost - self.spent_before - self.cost)

    def metrics(self) -> dict[str, float]:
        """Totals since the start, flat; a step's share is the difference of two of these."""
        totals = {
            "calls": self.calls,
            "retries": self.retries,
            "tokens_in": self.tokens_in,
            "tokens_cached": self.tokens_cached,
            "tokens_out": self.tokens_out,
            "cost": self.cost,
        }
        return totals | {f"failed_attempts/{kind.value}": float(n) for kind, n in sorted(self.failures.items())}


class Outage:
    """Tells a bad request from a server that is down, and waits for the latter within a budget.

    A call that used up its attempts asks `over`: one health check for all waiting calls. If the server is well, the
    request itself is at fault. Otherwise everyone waits for it to come back, at most `budget` seconds.
    """

    def __init__(self, healthy: Callable[[], Awaitable[bool]], budget: float, *, gate: Gate, notice: Notice) -> None:
        self._healthy = healthy
        self.budget = budget
        self._gate = gate
        self._notice = notice
        self._check: asyncio.Task[bool] | None = None

    async def over(self) -> bool:
        """True: there was an outage, and it has passed. False: the server was well all along.

        Raises `RunStopped` when the server did not come back within the budget.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.ensure_future(self._wait())
        return await asyncio.shield(self._check)

    async def _wait(self) -> bool:
        began, pause = time.monotonic(), 0.25
        if await self._healthy():
            return False
        while (left := began + self.budget - time.monotonic()) > 0:
            if time.monotonic() + pause - began > LONG_WAIT:
                self._notice.waiting("the server does not answer", left)
            self._gate.close_for(min(pause, left))
            await asyncio.sleep(min(pause, left))
            if await self._healthy():
                self._notice.over()
                return True
            pause = min(2 * pause, 30.0)
        raise RunStopped(
            f"the evaluator's endpoint has not answered for {self.budget:.0f} s (`outage` in its configuration); "
            "start it again and resume"
        )

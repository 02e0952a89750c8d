"""What evaluators behind endpoints take: estimated beforehand, and kept so that `max_cost` outlives a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlme.evaluators.base import Evaluator
from rlme.evaluators.endpoint_wire import Usage
from rlme.evaluators.rehearsal import Rehearsal
from rlme.folders import replace_file

Totals = dict[str, dict[str, float]]


def paid(evaluators: Sequence[Evaluator]) -> list[Any]:
    """Those that are asked over HTTP, without the cache before them."""
    inner = [getattr(evaluator, "inner", evaluator) for evaluator in evaluators]
    return [evaluator for evaluator in inner if hasattr(evaluator, "account")]


def call_off(evaluators: Iterable[Any]) -> None:
    """Let evaluators that are paid end what they are asking, and count it."""
    for evaluator in evaluators:
        evaluator.call_off()


def rehearsed(evaluators: Sequence[Evaluator], ask: Callable[[Evaluator], float]) -> list[tuple[Any, Usage]]:
    """For every evaluator that is paid: what it would take. `ask` asks a stand-in about a sample and returns how many
    times that is to come. A server that cannot count is left out."""
    found = []
    for evaluator in paid(evaluators):
        rehearsal = Rehearsal(evaluator)
        try:
            factor = ask(rehearsal)
        except ConnectionError:
            continue
        found.append((evaluator, rehearsal.usage.times(factor)))
    return found


def forecast(
    evaluator: Any,
    usage: Usage,
    cost: float,
    *,
    how: str,
    where: str,
    why: str,
    stop: Callable[[float], str],
    processes: int = 1,
) -> tuple[str, bool]:
    """A sentence about what is to come, and whether it goes beyond `max_cost`.

    `how`: "about" or "at most"; `where`: what it is for; `why`: what the numbers go by; `stop(share)`: what happens at
    `max_cost`, that share of the way.
    """
    cached = f" ({usage.tokens_cached:,} of them cached)" if usage.tokens_cached else ""
    text = (
        f"{evaluator.name}: {how} {usage.tokens_in:,} prompt tokens{cached} and {usage.tokens_out:,} generated ones "
        f"{where} ({why})"
    )
    left = evaluator.account.left * processes
    if cost:
        text += f", a cost of {how} {cost:.4g}"
    if cost > left:
        text += f"; max_cost leaves {left:.4g}, {stop(left / cost)}"
    return text, cost > left


def estimates(
    expected: Sequence[tuple[Any, Usage]], *, how: str, where: str, why: str
) -> Iterator[tuple[str, str | None]]:
    """Lines to print, with their style, about work that keeps what it has when `max_cost` is reached."""
    for evaluator, usage in expected:
        cost = evaluator.config.prices.cost(usage.tokens_in, usage.tokens_cached, usage.tokens_out)
        text, over = forecast(
            evaluator,
            usage,
            cost,
            how=how,
            where=where,
            why=why,
            stop=lambda share: f"so it may stop after {share:.0%} of them, and goes on when run again with more",
        )
        yield text, "yellow" if over else None


def added(parts: Iterable[Totals]) -> Totals:
    """Sums by evaluator and key."""
    found: Totals = {}
    for part in parts:
        for name, values in part.items():
            sums = found.setdefault(name, {})
            for key, value in values.items():
                sums[key] = sums.get(key, 0.0) + value
    return found


class Ledger:
    """`spent.json`: what each paid evaluator has taken over all starts of a run in one process."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._before: Totals = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._evaluators: list[Any] = []

    def adopt(self, evaluators: Sequence[Evaluator]) -> None:
        """Keep account of these; what was spent under their names before counts for `max_cost`."""
        for evaluator in paid(evaluators):
            if evaluator not in self._evaluators:
                evaluator.account.spent_before = self.totals().get(evaluator.name, {}).get("cost", 0.0)
                self._evaluators.append(evaluator)

    def totals(self) -> Totals:
        """By evaluator: calls, tokens, cost and what else its account holds."""
        return added([self._before, *({e.name: e.account.metrics()} for e in self._evaluators)])

    def costs(self) -> dict[str, float]:
        """By evaluator: the money."""
        return {name: account.get("cost", 0.0) for name, account in self.totals().items()}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Save it at the end; where that is an error, with what is still being asked called off and counted."""
        try:
            yield
        except BaseException:
            call_off(self._evaluators)
            raise
        finally:
            self.save()

    def save(self) -> None:
        """Write it, by one rename, if anything is paid for."""
        if self._evaluators:
            replace_file(self.file, json.dumps(self.totals(), indent=2) + "\n")

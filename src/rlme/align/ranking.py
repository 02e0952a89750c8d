"""Ranking the candidates of one prompt by comparing them in pairs.

A candidate's score is the mean of its soft wins over its comparisons (arXiv 2602.16802). Candidates that are equal
texts are judged once. Where a comparison failed, the candidates left are those that were all compared with each other:
one over-long answer costs itself, not the group.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from rlme.align.judge import TIE, Comparison, Orders, PairwiseJudge, Verdict, choice
from rlme.judgement import Message

Schedule = Literal["ordered", "unordered", "tournament"]
"""ordered: every pair in both orders. unordered: every pair once, in a random order. tournament: knock-out for the best
and for the worst, both orders."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The answers to one prompt, and what a judge may be shown beside them. `key` seeds what is random."""

    instruction: str
    texts: tuple[str, ...]
    references: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What the comparisons came to.

    `scores`: per candidate the mean soft win rate in [0, 1], None where its comparisons failed or there was nobody to
    compare it with. `best` and `worst` are indices into the candidates, None when there are no two different scores
    (or, in a tournament, no winner or loser). `margin` is score(best) - score(worst).
    """

    scores: tuple[float | None, ...]
    best: int | None = None
    worst: int | None = None
    readings: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    mass: float | None = None
    tokens_in: int = 0
    cost: float = 0.0

    @property
    def margin(self) -> float | None:
        """By how much the best candidate's score exceeds the worst one's."""
        if self.best is None or self.worst is None:
            return None
        high, low = self.scores[self.best], self.scores[self.worst]
        return None if high is None or low is None else high - low


def instruction_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as a judge reads it: the text, the only user turn, or the conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [m for m in prompt if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)


def calls_needed(n: int, schedule: Schedule) -> int:
    """Judge calls for n different candidates with one reference and one evaluator."""
    if n < 2:
        return 0
    pairs = n * (n - 1) // 2
    if schedule == "tournament":
        matches, bye = n // 2, n % 2
        # Round one, then a knock-out among the winners and one among the losers; who had a bye is in both.
        return 2 * (matches + 2 * (matches + bye - 1)) if n > 2 else 2
    return 2 * pairs if schedule == "ordered" else pairs


def rank(groups: Sequence[Candidates], judge: PairwiseJudge, schedule: Schedule, *, seed: int = 0) -> list[Ranking]:
    """Rank the candidates of every group; all groups' comparisons of a round go to the judge together."""
    tables = [_Table(group, seed) for group in groups]
    if schedule == "tournament":
        _tournament(tables, judge)
    else:
        orders: Orders = "both" if schedule == "ordered" else "given"
        _play(tables, [t.all_pairs(shuffled=schedule == "unordered") for t in tables], judge, orders)
    return [table.ranking(knockout=schedule == "tournament") for table in tables]


class _Table:
    """The comparisons of one group so far. `wins[i, j]` is p(text i better than text j), None when it failed."""

    def __init__(self, group: Candidates, seed: int) -> None:
        self.group = group
        self.texts = list(dict.fromkeys(group.texts))
        self.random = random.Random(f"{seed}-{group.key or group.instruction}")
        self.wins: dict[tuple[int, int], float | None] = {}
        self.verdicts: list[Verdict] = []
        self.champion: int | None = None
        self.last: int | None = None

    def all_pairs(self, *, shuffled: bool) -> list[tuple[int, int]]:
        pairs = list(combinations(range(len(self.texts)), 2))
        if shuffled:
            # One presentation order a pair, drawn: position bias then averages out over the comparisons.
            pairs = [pair if self.random.random() < 0.5 else (pair[1], pair[0]) for pair in pairs]
        return pairs

    def comparison(self, i: int, j: int) -> Comparison:
        return Comparison(self.group.instruction, self.texts[i], self.texts[j], self.group.references)

    def record(self, i: int, j: int, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        score = verdict.score
        self.wins[i, j] = score
        self.wins[j, i] = None if score is None else 1 - score

    def kept(self) -> list[int]:
        """The texts whose comparisons with each other all came back: the one with most failures leaves first."""
        left = list(range(len(self.texts)))
        while True:
            failed = Counter(
                i for i in left for j in left if i != j and (i, j) in self.wins and self.wins[i, j] is None
            )
            if not failed:
                return left
            left.remove(max(left, key=lambda i: (failed[i], i)))

    def ranking(self, *, knockout: bool) -> Ranking:
        left = self.kept()
        scores: dict[int, float] = {}
        for i in left:
            won = [w for j in left if (w := self.wins.get((i, j))) is not None]
            if won:
                scores[i] = sum(won) / len(won)
        best, worst = self.champion, self.last
        if not knockout and scores:
            best = max(scores, key=lambda i: scores[i])
            worst = min(scores, key=lambda i: scores[i])
            if scores[best] - scores[worst] < TIE:
                best = worst = None
        elif best is not None and (best == worst or best not in scores or worst not in scores):
            best = worst = None
        place = {text: i for i, text in reversed(list(enumerate(self.group.texts)))}
        readings = [r for verdict in self.verdicts for r in verdict.readings]
        masses = [r.mass for r in readings if r.mass is not None]
        total: Counter[str] = Counter(r.failure.value for r in readings if r.failure is not None)
        return Ranking(
            scores=tuple(scores.get(self.texts.index(text)) for text in self.group.texts),
            best=None if best is None else place[self.texts[best]],
            worst=None if worst is None else place[self.texts[worst]],
            readings=len(readings),
            failures=dict(total),
            shortened=sum(v.shortened for v in self.verdicts),
            mass=sum(masses) / len(masses) if masses else None,
            tokens_in=sum(r.tokens_in for r in readings),
            cost=sum(r.cost for r in readings),
        )


def _play(
    tables: Sequence[_Table], rounds: Sequence[list[tuple[int, int]]], judge: PairwiseJudge, orders: Orders
) -> None:
    """Judge each table's pairs, all in one call."""
    matches = [(table, i, j) for table, pairs in zip(tables, rounds, strict=True) for i, j in pairs]
    verdicts = judge.judge([table.comparison(i, j) for table, i, j in matches], orders=orders)
    for (table, i, j), verdict in zip(matches, verdicts, strict=True):
        table.record(i, j, verdict)


def _tournament(tables: Sequence[_Table], judge: PairwiseJudge) -> None:
    brackets: list[tuple[list[int], list[int]]] = []
    first = []
    for table in tables:
        order = list(range(len(table.texts)))
        table.random.shuffle(order)
        brackets.append((order, order))
        first.append(_matches(order))
    _play(tables, first, judge, "both")
    winners = [_after(t, b[0], up=True) for t, b in zip(tables, brackets, strict=True)]
    losers = [_after(t, b[1], up=False) for t, b in zip(tables, brackets, strict=True)]
    while any(len(w) > 1 or len(x) > 1 for w, x in zip(winners, losers, strict=True)):
        pairs = [_new(t, [*_matches(w), *_matches(x)]) for t, w, x in zip(tables, winners, losers, strict=True)]
        _play(tables, pairs, judge, "both")
        winners = [_after(t, w, up=True) for t, w in zip(tables, winners, strict=True)]
        losers = [_after(t, x, up=False) for t, x in zip(tables, losers, strict=True)]
    for table, won, lost in zip(tables, winners, losers, strict=True):
        if len(table.texts) > 1 and won and lost:
            table.champion, table.last = won[0], lost[0]


def _matches(order: Sequence[int]) -> list[tuple[int, int]]:
    return [(order[k], order[k + 1]) for k in range(0, len(order) - 1, 2)]


def _new(table: _Table, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those not compared yet, each once (the two brackets may meet in the same pair)."""
    found: dict[frozenset[int], tuple[int, int]] = {frozenset(pair): pair for pair in pairs if pair not in table.wins}
    return list(found.values())


def _after(table: _Table, order: Sequence[int], *, up: bool) -> list[int]:
    """Who goes on: winners (or losers) of the matches, and whoever had no opponent. Nobody goes on from a failure or a
    tie."""
    going: list[int] = []
    for i, j in _matches(order):
        score = table.wins[i, j]
        if score is not None and choice(score):
            going.append(i if (choice(score) == 1) == up else j)
    return going + ([order[-1]] if len(order) % 2 else [])

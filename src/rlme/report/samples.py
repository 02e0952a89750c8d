"""Which completions go into the page, and what is marked on them.

A page must stay small enough to open and to send (below 10 MB), a run of 500 steps x 96 completions is not. So whole
groups are taken, by a rule the page states: first the groups of evenly spaced steps (always the first, the last, those
with an alarm and the best), then groups with something to see from all other steps.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from rlme.report.content import best_heldout
from rlme.report.html import embed
from rlme.report.run import Run
from rlme.training.monitors import addresses_evaluator, best_step
from rlme.training.run_folder import ROLLOUTS

Row = dict[str, Any]

STEPS = 60
"""Evenly spaced steps to show."""
BUDGET = 6_000_000
"""Size of all samples in the page, in bytes."""
NOTABLE = 40
"""Groups taken from other steps for each thing to see."""
LONGEST = 6000
"""Longer texts are cut in the page (and say so); the Parquet files have all of it."""
DISAGREE = 0.5
"""Evaluators disagree when their probabilities for one question lie at least this far apart."""
MARKS = {
    "wrong": "high reward, wrong",
    "disagree": "evaluators disagree",
    "failed": "failed judgement",
    "clipped": "cut off",
    "addresses": "addresses the evaluator",
}


@dataclass(frozen=True)
class Samples:
    """Chosen completions, ready for JSON, and the sentences that say how they were chosen."""

    groups: list[dict[str, Any]]
    rule: str
    missing: list[str]


def marks(row: Mapping[str, Any], highest: float | None) -> list[str]:
    """The keys of `MARKS` that apply; `highest` is the best reward in the row's group."""
    found = []
    if row["correct"] is False and row["reward"] is not None and row["reward"] == highest:
        found.append("wrong")
    by_question: dict[str, list[float]] = defaultdict(list)
    for judgement in row["judgements"] or ():
        if judgement["probability"] is not None:
            by_question[judgement["question"]].append(judgement["probability"])
    if any(max(p) - min(p) >= DISAGREE for p in by_question.values()):
        found.append("disagree")
    if any(judgement["failure"] is not None for judgement in row["judgements"] or ()):
        found.append("failed")
    if row["truncated"]:
        found.append("clipped")
    if addresses_evaluator(row["completion"]):
        found.append("addresses")
    return found


def choose(run: Run, *, budget: int = BUDGET, steps: int = STEPS) -> Samples:
    """Read rollouts and held-out completions and choose the groups to show."""
    missing: list[str] = []
    total = 0
    page = _Page()
    rest: list[_Place] = []
    for held_out, share in ((False, 0.7), (True, 0.15)):
        files = run.rollout_files(held_out=held_out)
        wanted = _spread(list(files), steps if not held_out else steps // 3) | (_special(run) & files.keys())
        groups: list[tuple[_Place, list[Row]]] = []
        for step, path in _with_bar(files, "held-out answers" if held_out else "rollouts"):
            try:
                read = _groups(path)
            except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
                missing.append(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__}).")
                continue
            total += sum(len(group) for group in read)
            for number, group in enumerate(read):
                place = _Place(step, held_out, path, number, frozenset(mark for row in group for mark in row["marks"]))
                if step in wanted:
                    groups.append((place, group))
                else:  # a whole run's judgements would not fit into memory
                    rest.append(place)
        # Where not all groups of those steps fit, each step gives the same number, first ones first.
        per_step: dict[int, int] = defaultdict(int)
        order = []
        for place, group in groups:
            order.append((per_step[place.step], place.step, place, group))
            per_step[place.step] += 1
        limit = page.spent + int(budget * share)
        rest += [
            place for _, _, place, group in sorted(order, key=lambda o: o[:2]) if not page.add(place, group, limit)
        ]
    random.Random(0).shuffle(rest)  # seeded: the same run gives the same page
    notable: set[int] = set()
    for mark in ("failed", "wrong", "disagree", "addresses"):
        with_mark = [i for i, place in enumerate(rest) if i not in notable and mark in place.marks]
        notable |= {i for i in with_mark[:NOTABLE] if page.add(rest[i], _groups(rest[i].path)[rest[i].number], budget)}
    page.groups.sort(key=lambda g: (g["heldout"], g["step"], g["index"]))
    shown = sum(len(group["rows"]) for group in page.groups)
    if shown == total:
        rule = f"All {total:,} completions of the run are here." if total else ""
    else:
        rule = (
            f"{shown:,} of the run's {total:,} completions are here, always whole groups: those of up to {steps} "
            f"evenly spaced steps (with the first, the last, the best and those with an alarm)"
            + (f", and {len(notable)} groups with something to see from other steps" if notable else "")
            + ". The Parquet files in rollouts/ have them all."
        )
    return Samples(page.groups, rule, missing)


@dataclass(frozen=True)
class _Place:
    """Where a group stands in the run's files, and what there is to see in it."""

    step: int
    held_out: bool
    path: Path
    number: int
    marks: frozenset[str]


class _Page:
    """Groups as they stand in the page, as long as there is room."""

    def __init__(self) -> None:
        self.spent = 0
        self.groups: list[dict[str, Any]] = []

    def add(self, place: _Place, group: list[Row], limit: int) -> bool:
        """Take the group in if it fits below `limit`."""
        if self.spent >= limit:
            return False
        packed = _pack(place.step, place.held_out, group)
        size = len(embed(packed).encode())
        if self.spent + size > limit:
            return False
        self.spent += size
        self.groups.append(packed)
        return True


def _with_bar(files: Mapping[int, Path], what: str) -> Iterable[tuple[int, Path]]:
    """A bar with the time left where a person waits for many files."""
    console = Console(stderr=True)
    disable = not console.is_terminal or len(files) < 50
    yield from track(files.items(), f"reading {what}", console=console, transient=True, disable=disable)


def _spread(steps: list[int], count: int) -> set[int]:
    if len(steps) <= count:
        return set(steps)
    return {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)} if count > 1 else set(steps[-1:])


def _special(run: Run) -> set[int]:
    best = best_heldout(run)
    step = best_step(best[1]) if best else None
    return {alarm for alarm, _ in run.alarms} | ({step} if step is not None else set())


def _groups(path: Path) -> list[list[Row]]:
    """The file's rows by prompt, each group ordered by reward (best first, missing last), with marks."""
    import pyarrow.parquet as pq

    groups: dict[int, list[Row]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        whole = dict.fromkeys(ROLLOUTS.names) | row  # another version's file may lack a column
        judged = dict.fromkeys(field.name for field in ROLLOUTS.field("judgements").type.value_type)
        whole["judgements"] = [judged | judgement for judgement in whole["judgements"] or ()]
        groups[row["prompt_index"]].append(whole | {"completion": row["completion"] or ""})
    for group in groups.values():
        highest = max((r["reward"] for r in group if r["reward"] is not None), default=None)
        for row in group:
            row["marks"] = marks(row, highest)
        group.sort(key=lambda r: (r["reward"] is None, -(r["reward"] or 0.0)))
    return list(groups.values())


def _cut(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n[... {len(text) - LONGEST:,} more characters]"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _pack(step: int, held_out: bool, group: list[Row]) -> dict[str, Any]:
    """Short keys: they are repeated for every completion."""
    return {
        "step": step,
        "heldout": held_out,
        "index": group[0]["prompt_index"],
        "prompt": _cut(group[0]["prompt"]),
        "rows": [
            {
                "text": _cut(row["completion"]),
                "chars": len(row["completion"]),
                "tokens": row["tokens"],
                "answer": row["answer"],
                "gold": row["gold"],
                "correct": row["correct"],
                "anchored": bool(row["anchored"]),
                "reward": _round(row["reward"]),
                "advantage": _round(row["advantage"]),
                "marks": row["marks"],
                # evaluator, question, probability, score, mass, failure, detail, critique, weight, bounded
                "judged": [
                    [
                        j["evaluator"],
                        j["question"],
                        _round(j["probability"]),
                        _round(j["score"]),
                        _round(j["mass"]),
                        j["failure"],
                        _cut(j["detail"]),
                        _cut(j["critique"]),
                        _round(j["weight"]),
                        bool(j.get("bounded")),  # not in runs before there was one
                    ]
                    for j in row["judgements"] or ()
                ],
            }
            for row in group
        ],
    }

"""The lab's prompt files: problems of the world as JSONL, the same for every run of a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlme.lab.world import FAMILIES, Problem, define, draw_problem

TRAINED, HELD_OUT = 8000, 200
PER_DOMAIN = 60
AGAINST = "against"


def write_data(folder: Path) -> None:
    """All prompt files; held-out problems are in no training file."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = set()
    for name, make, count in (
        ("plain-eval", _plain, HELD_OUT),
        ("hinted-eval", _misled, HELD_OUT),
        ("reading-eval", _reading_test, PER_DOMAIN * (len(FAMILIES) + 1)),
        ("plain-train", _plain, TRAINED),
        ("hinted-train", _told, TRAINED),
        ("reading-train", _reading, TRAINED),
    ):
        rows = []
        for problem, domain in make(random.Random(f"lab-{name}")):
            key = replace(problem, hint=None).text
            if key in held_out:
                continue
            if name.endswith("eval"):
                held_out.add(key)
            rows.append({"problem": problem.text, "answer": str(problem.answer), "domain": domain})
            if len(rows) == count:
                break
        _write(folder / f"{name}.jsonl", rows)


Drawn = Iterator[tuple[Problem, str]]


def _forever(draw: Callable[[random.Random, str], Problem]) -> Callable[[random.Random], Drawn]:
    def problems(rng: random.Random) -> Drawn:
        while True:
            for family in FAMILIES:
                yield draw(rng, family), family

    return problems


_plain = _forever(lambda rng, family: draw_problem(rng, family=family))


@_forever
def _told(rng: random.Random, family: str) -> Problem:
    problem = draw_problem(rng, family=family)
    return replace(problem, hint=problem.answer)


@_forever
def _misled(rng: random.Random, family: str) -> Problem:
    """The claim is any other answer, so that copying it is never right by luck."""
    problem = draw_problem(rng, family=family)
    return replace(problem, hint=(problem.answer + rng.randint(1, 9)) % 10)


@_forever
def _reading(rng: random.Random, family: str) -> Problem:
    return define(rng, draw_problem(rng, family=family), rng.choice(("invented", "same")))


def _reading_test(rng: random.Random) -> Drawn:
    """Each family in turn, then one problem whose text goes against what the corpus taught."""
    source = _reading(rng)
    while True:
        for _ in FAMILIES:
            yield next(source)
        yield define(rng, draw_problem(rng), AGAINST), AGAINST


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)

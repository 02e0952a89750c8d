"""How much of its probability a judge puts on the labels it is asked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal

_TRY = {"protocol": "another protocol or judge", "question": "another template or read-out"}


class LabelMass:
    """The mean so far, by evaluator and what it was asked: a protocol, or a question."""

    def __init__(self, kind: Literal["protocol", "question"]) -> None:
        self.kind = kind
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, evaluator: str, asked: str, mass: float | None) -> None:
        """One reading; a failed one has no mass and does not count."""
        if mass is not None:
            self._sums[evaluator, asked] += mass
            self._counts[evaluator, asked] += 1

    def warnings(self, threshold: float) -> dict[tuple[str, str], str]:
        """A sentence for every mean below the threshold."""
        means = {key: self._sums[key] / n for key, n in self._counts.items()}
        return {
            (evaluator, asked): low_mass(evaluator, self.kind, asked, mean)
            for (evaluator, asked), mean in means.items()
            if mean < threshold
        }


def low_mass(evaluator: str, kind: Literal["protocol", "question"], asked: str, mean: float) -> str:
    """What is said of a judge that puts little probability on the labels."""
    return (
        f"warning: evaluator {evaluator!r} puts only {mean:.0%} of its probability on the labels of {kind} {asked!r}; "
        f"its verdicts may mean little (try {_TRY[kind]})"
    )

"""From the lab's run folders to numbers: curves over seeds, last values, alarms."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rlme.lab.chart import Line
from rlme.lab.experiments import Arm, Experiment
from rlme.lab.run import run_folder
from rlme.training.run_folder import RunFolder

SMOOTHING = 0.9
"""The paper plots training accuracy as an exponential moving average with this decay."""
LAST = 20
"""Steps that "at the end" averages over."""

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class ArmRuns:
    """All runs of an arm: metrics by seed."""

    arm: Arm
    folders: dict[int, Path]
    records: dict[int, Records]

    @property
    def steps(self) -> int:
        """Steps of the shortest run."""
        return min(max(r["step"] for r in records) for records in self.records.values())


def load_runs(out: Path, experiment: Experiment) -> list[ArmRuns]:
    """The finished runs of an experiment; arms without any are left out."""
    found = []
    for arm in experiment.arms:
        folders = {seed: run_folder(out, experiment, arm, seed) for seed in range(100)}
        folders = {seed: f for seed, f in folders.items() if RunFolder(f).final.is_dir()}
        if folders:
            found.append(ArmRuns(arm, folders, {s: RunFolder(f).read_lines() for s, f in folders.items()}))
    return found


def smoothed(values: list[float], decay: float = SMOOTHING) -> list[float]:
    """Exponential moving average that starts at the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else decay * out[-1] + (1 - decay) * value)
    return out


def curve(runs: ArmRuns, key: str, colour: int, *, smooth: bool) -> Line | None:
    """Mean over seeds of a metric by step, the band from the lowest to the highest seed."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for records in runs.records.values():
        points = [(r["step"], r[key]) for r in records if key in r]
        values = [v for _, v in points]
        for (step, _), value in zip(points, smoothed(values) if smooth else values, strict=True):
            by_step[step].append(value)
    steps = sorted(s for s, values in by_step.items() if len(values) == len(runs.records))
    if not steps:
        return None
    several = len(runs.records) > 1
    return Line(
        runs.arm.label,
        steps,
        [fmean(by_step[s]) for s in steps],
        [min(by_step[s]) for s in steps] if several else None,
        [max(by_step[s]) for s in steps] if several else None,
        colour,
    )


def first(runs: ArmRuns, key: str) -> list[float]:
    """The value before training, by seed."""
    return [next(r[f"eval/{key}"] for r in records if f"eval/{key}" in r) for records in runs.records.values()]


def last(runs: ArmRuns, key: str, *, held_out: bool = False) -> list[float]:
    """By seed: the last held-out value, or the mean over the last steps of training."""
    ends = []
    for records in runs.records.values():
        values = [r[f"eval/{key}" if held_out else key] for r in records if (f"eval/{key}" if held_out else key) in r]
        if values:
            ends.append(values[-1] if held_out else fmean(values[-LAST:]))
    return ends


def shown(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation, as a table shows them."""
    if not values:
        return "-"
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {pstdev(values):.{digits}f}"


def alarms(runs: ArmRuns) -> str:
    """In how many runs the monitor rang, and at which steps."""
    steps = [next((r["step"] for r in records if "alarm" in r), None) for records in runs.records.values()]
    rang = [str(s) for s in steps if s is not None]
    return f"{len(rang)} of {len(steps)}" + (f" (step {', '.join(rang)})" if rang else "")

"""`rlme lab report`: docs/lab.md and its plots, from the run folders and the paper's decoded curves.

What a person wrote between `<!-- remarks NAME -->` and `<!-- end -->` stays when the page is made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from rlme.errors import InputError
from rlme.lab.chart import Line, Panel, chart
from rlme.lab.experiments import EXPERIMENTS, Experiment
from rlme.lab.results import ArmRuns, alarms, curve, first, last, load_runs, shown
from rlme.lab.tables import reading_table

_REMARKS = re.compile(r"<!-- remarks ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
ACCURACY = "gold/accuracy"
LENGTH = "completions/mean_chars"


def paper_curves() -> dict[str, dict[str, dict[str, list[float]]]]:
    """The curves of the paper's figures, decoded from its plots and thinned."""
    file = resources.files("rlme") / "lab" / "paper_curves.json"
    curves: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return curves


def write_page(out: Path, docs: Path) -> Path:
    """The page and its plots; experiments without a finished run are named as not run."""
    results = {name: load_runs(out, e) for name, e in EXPERIMENTS.items()}
    if not any(results.values()):
        raise InputError(f"{out} holds no finished run of the lab: rlme lab fig2 --out {out}")
    page = docs / "lab.md"
    remarks = dict(_REMARKS.findall(page.read_text(encoding="utf-8"))) if page.is_file() else {}
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [_block("top", remarks, "# The lab\n")]
    for name, experiment in EXPERIMENTS.items():
        runs = results[name]
        parts.append(f"## {experiment.title}\n\n`rlme lab {name}`: {experiment.shows}.\n")
        if runs:
            parts += _section(out, experiment, runs, images)
        else:
            parts.append("Not run yet.\n")
        parts.append(_block(name, remarks, ""))
    parts.append(_block("bottom", remarks, ""))
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def summary(out: Path, experiments: Sequence[Experiment]) -> str:
    """The tables of these experiments, as `rlme lab NAME` shows them at its end."""
    tables = []
    for experiment in experiments:
        runs = load_runs(out, experiment)
        if runs:
            tables.append(f"{experiment.title}\n\n{_table_of(out, experiment, runs)}")
    return "\n".join(tables)


def _block(name: str, remarks: dict[str, str], default: str) -> str:
    return f"<!-- remarks {name} -->\n{remarks.get(name, default)}<!-- end -->\n"


def _section(out: Path, experiment: Experiment, runs: list[ArmRuns], images: Path) -> list[str]:
    table = _table_of(out, experiment, runs)
    if experiment.paper is None:
        return [_sentence(experiment, runs), table]
    image = images / f"lab-{experiment.name}.svg"
    image.write_text(chart(_panels(experiment, runs)), encoding="utf-8")
    return [_sentence(experiment, runs), f"![{experiment.title}](images/{image.name})\n", table]


def _table_of(out: Path, experiment: Experiment, runs: list[ArmRuns]) -> str:
    if experiment.paper is None:  # a table of the paper, not a figure
        return reading_table(out / "data" / "reading-eval.jsonl", runs)
    return _table(runs)


def _sentence(experiment: Experiment, runs: list[ArmRuns]) -> str:
    seeds = sorted({len(r.records) for r in runs})
    steps = sorted({r.steps for r in runs})
    what = (
        "Accuracy on held-out problems; mean and standard deviation over seeds."
        if experiment.paper is None
        else "Lines are means over seeds of the training batch's accuracy, smoothed as the paper's (decay .9); bands "
        "reach from the lowest to the highest seed."
    )
    return f"Seeds: {' or '.join(map(str, seeds))}; steps: {' or '.join(map(str, steps))}. {what}\n"


def _panels(experiment: Experiment, runs: list[ArmRuns]) -> list[Panel]:
    counterfactual = experiment.name == "fig7"  # the paper plots the test, where the planted answer is wrong
    key = f"eval/{ACCURACY}" if counterfactual else ACCURACY
    what = "accuracy with a wrong answer planted" if counterfactual else "accuracy"
    panels = [Panel(f"lab: {what}", _lines(runs, key, smooth=not counterfactual))]
    paper = paper_curves().get(experiment.paper or "", {})
    panels.append(Panel(f"paper: {what}", _paper_lines(paper, runs)))
    if experiment.name == "fig5":
        judged = [line for line in _lines(runs, "reward", smooth=True) if line.label != "RLVR"]
        panels[1:1] = [Panel("lab: reward (log p)", judged, y_range=(-1.0, 0.0))]
        paper_rewards = _paper_lines(paper_curves()["fig5-reward"], runs)
        panels.append(Panel("paper: reward (log p)", paper_rewards, y_range=(-1.0, 0.0)))
    if experiment.name == "fig6":
        panels[1:1] = [Panel("lab: characters", _lines(runs, LENGTH, smooth=True), y_range=None)]
        panels.append(Panel("paper: characters", _paper_lines(paper_curves()["fig6-length"], runs), y_range=None))
        panels.insert(2, _trade_off(runs))
    return panels


def _trade_off(runs: list[ArmRuns]) -> Panel:
    """Length against accuracy at the end, held out: a dot for every run, a line through the sweep's means."""
    ends = {r.arm.label: (last(r, LENGTH, held_out=True), last(r, ACCURACY, held_out=True)) for r in runs}
    lines = [Line(r.arm.label, *ends[r.arm.label], colour=i, dots=True) for i, r in enumerate(runs)]
    swept = sorted((r.arm.weight, r.arm.label) for r in runs if r.arm.weight is not None)
    means = [[fmean(values) for values in ends[label]] for _, label in swept]
    along = Line("by weight", [m[0] for m in means], [m[1] for m in means], colour=len(runs))
    characters = [x for xs, _ in ends.values() for x in xs]
    around = (min(characters) - 5, max(characters) + 5)
    return Panel("lab: the trade-off, held out", [*lines, along], "characters", (0.6, 1.0), around)


def _lines(runs: list[ArmRuns], key: str, *, smooth: bool) -> list[Line]:
    lines = [curve(r, key, i, smooth=smooth) for i, r in enumerate(runs)]
    return [line for line in lines if line is not None]


def _paper_lines(curves: dict[str, dict[str, list[float]]], runs: list[ArmRuns]) -> list[Line]:
    """The paper's curves in the colours of the arms they stand beside; its others after them."""
    colours = {r.arm.paper: i for i, r in enumerate(runs) if r.arm.paper}
    spare = len(runs)
    lines = []
    for label, points in curves.items():
        if label not in colours:
            colours[label] = spare
            spare += 1
        lines.append(Line(label, points["x"], points["y"], colour=colours[label]))
    return lines


def _table(runs: list[ArmRuns]) -> str:
    rows = [
        "| arm | before | last 20 steps | held out, last | characters, first | last | alarm |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        cells = (
            r.arm.label,
            shown(first(r, ACCURACY)),
            shown(last(r, ACCURACY)),
            shown(last(r, ACCURACY, held_out=True)),
            shown(first(r, LENGTH), 0),
            shown(last(r, LENGTH, held_out=True), 0),
            alarms(r),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"

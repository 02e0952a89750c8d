"""Runs laid over each other: seeds of one configuration become a band, differences a table."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlme.config import Config
from rlme.errors import InputError
from rlme.report import html
from rlme.report.content import WINDOW, Chart, Finding, Series, best_heldout, judges, short, spending, start_and_now
from rlme.report.page_data import SMOOTH, chart_data
from rlme.report.run import READ, Run, read_run
from rlme.result_files import check_writable
from rlme.training.monitors import GOLD, spoken

IGNORED = ("train.seed", "output")
"""Keys that may differ between the seeds of one configuration."""

NAME = 40
"""Characters of a setting's value that may name a configuration."""


@dataclass(frozen=True)
class Arm:
    """Runs of one configuration."""

    name: str
    runs: list[Run]


@dataclass(frozen=True)
class Measure:
    """A number of each run, for the table: over the seeds of an arm it has a mean and a spread."""

    name: str
    values: list[list[float]]
    """Per arm, one value for each run that has it."""


def write_comparison(
    folders: Sequence[Path], output: Path, table: Path | None = None
) -> tuple[list[Arm], list[list[str]]]:
    """Write the page that compares runs, and the table as JSON. Returns the arms and the table's rows.

    A folder that is named twice is one run, not two seeds.
    """
    if len(folders) < 2:
        raise InputError(f"rlme compare needs two or more runs, got {len(folders)}")
    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    check_writable(output, table, inputs=[run.folder / name for run in runs for name in READ])
    arms, differing = group_runs(runs)
    table_of = measures(arms)
    output.write_bytes(html.render("comparison - rlme", _page(runs, arms, differing, table_of)))
    if table is not None:
        content = {
            "arms": {arm.name: [str(run.folder) for run in arm.runs] for arm in arms},
            "measures": {m.name: dict(zip((a.name for a in arms), m.values, strict=True)) for m in table_of},
        }
        table.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return arms, _rows(arms, table_of)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = json.dumps(value, ensure_ascii=False, default=str)
    return flat


def _settings(run: Run) -> dict[str, str]:
    """Every key with its value; keys that the version that made the run did not know have their defaults."""
    try:
        config = Config.model_validate(run.config).model_dump(mode="json") if run.config else {}
    except ValueError:  # of another version, or cut off
        config = run.config
    return {key: value for key, value in _flat(config).items() if key not in IGNORED}


def group_runs(runs: Sequence[Run]) -> tuple[list[Arm], list[tuple[str, list[str]]]]:
    """Arms in the order of their first run, and the settings in which they differ: (key, value of each arm).

    An arm is named after up to two settings that set it apart, or after its folder where these are long.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    settings: list[dict[str, str]] = []
    for run in runs:
        flat = _settings(run)
        # a run without its configuration can be the seed of no other
        identity = json.dumps(flat, sort_keys=True) if flat else str(run.folder)
        if identity not in groups:
            settings.append(flat)
        groups[identity].append(run)
    differing: list[tuple[str, list[str]]] = []
    for key in dict.fromkeys(key for setting in settings for key in setting):
        values = [setting.get(key, "(unset)") for setting in settings]
        if len(set(values)) > 1:
            differing.append((key, values))
    telling = 0 < len(differing) <= 2 and all(len(value) <= NAME for _, values in differing for value in values)
    names = []
    for i, members in enumerate(groups.values()):
        parts = [f"{key}={values[i]}" for key, values in differing]
        alone = f"{len(members)} seeds" if len(groups) == 1 and len(members) > 1 else members[0].name
        names.append(", ".join(parts) if telling else alone)
    unique = [name if names.count(name) == 1 else f"{name} [{i + 1}]" for i, name in enumerate(names)]
    return [Arm(n, members) for n, members in zip(unique, groups.values(), strict=True)], differing


def over_seeds(arm: Arm, key: str, group: int) -> Series | None:
    """Mean over the runs of an arm at each step that any has, and mean -/+ one standard deviation as a band."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in arm.runs:
        for step, value in zip(*run.series(key), strict=True):
            by_step[step].append(value)
    if not by_step:
        return None
    steps = sorted(by_step)
    means = [fmean(by_step[step]) for step in steps]
    band = None
    if len(arm.runs) > 1:
        spread = [stdev(by_step[step]) if len(by_step[step]) > 1 else 0.0 for step in steps]
        band = (
            [m - s for m, s in zip(means, spread, strict=True)],
            [m + s for m, s in zip(means, spread, strict=True)],
        )
    return Series(arm.name, steps, means, points=key.startswith("eval/"), band=band, group=group)


def _charts(arms: Sequence[Arm]) -> list[Chart]:
    pairs = list(dict.fromkeys(pair for arm in arms for run in arm.runs for pair in judges(run)))
    wanted = [
        ("Reward, training batch", "reward", False),
        ("Judged part of the reward, training batch", "reward/judged", False),
        ("Gold accuracy, held-out prompts", f"eval/{GOLD}", True),
        ("Gold accuracy, training batch", GOLD, True),
        *((f"{e}: {q}", f"judge/{e}/{q}/probability", True) for e, q in pairs),
        *((f"{e}: {q}, held-out prompts", f"eval/judge/{e}/{q}/probability", True) for e, q in pairs),
        ("Right above wrong, within a group", "gold/within_group_auroc", True),
        ("Length", "completions/mean_tokens", False),
        ("Distance from the start", "eval/kl_to_start", False),
        ("Distinct in a group", "completions/distinct", True),
        ("Address the evaluator", "completions/addresses_evaluator", True),
        ("Seconds of a step", "time/step", False),
    ]
    result = []
    for title, key, share in wanted:
        lines = [series for i, arm in enumerate(arms) if (series := over_seeds(arm, key, i)) is not None]
        if lines:
            bands = any(line.band for line in lines)
            result.append(
                Chart(title, "mean over seeds, band of one standard deviation" if bands else "", lines, share)
            )
    return result


def measures(arms: Sequence[Arm]) -> list[Measure]:
    """The table: what each run came to."""

    def last(key: str) -> list[list[float]]:
        return [[pair[1] for run in arm.runs if (pair := start_and_now(run, key))] for arm in arms]

    def each(number: Any) -> list[list[float]]:
        return [[v for run in arm.runs if (v := number(run)) is not None] for arm in arms]

    def heldout(key: str, *, best: bool) -> list[list[float]]:
        found = [[m[1] for run in arm.runs if (m := best_heldout(run)) and m[0] == key] for arm in arms]
        return [[max(m.values()) if best else m[max(m)] for m in arm] for arm in found]

    measured = dict.fromkeys(m[0] for arm in arms for run in arm.runs if (m := best_heldout(run)))
    table = [
        Measure("steps", each(lambda run: float(run.steps))),
        Measure("reward at the end", last("reward")),
        Measure("judged part of the reward at the end", last("reward/judged")),
        *(
            Measure(f"held-out {'gold' if key == GOLD else spoken(key)}, {which}", heldout(key, best=which == "best"))
            for key in measured
            for which in ("best", "last")
        ),
        Measure("training gold at the end", last(GOLD)),
        Measure("right above wrong in a group at the end", last("gold/within_group_auroc")),
        Measure("tokens of an answer at the end", last("completions/mean_tokens")),
        Measure("seconds of a step", each(lambda run: _mean(run.series("time/step")[1]))),
        Measure("cost", each(lambda run: spending(run).cost)),
        Measure("alarms", each(lambda run: float(len(run.alarms)))),
    ]
    return [measure for measure in table if any(measure.values)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return short(fmean(values)) + (f" ± {short(stdev(values))}" if len(values) > 1 else "")


def _rows(arms: Sequence[Arm], table: Sequence[Measure]) -> list[list[str]]:
    rows = []
    for measure in table:
        row, base = [measure.name, _cell(measure.values[0])], measure.values[0]
        for values in measure.values[1:]:
            row.append(_cell(values))
            row.append(f"{fmean(values) - fmean(base):+.3g}" if values and base else "")
        rows.append(row)
    return rows


def _page(
    runs: Sequence[Run], arms: Sequence[Arm], differing: list[tuple[str, list[str]]], table: Sequence[Measure]
) -> dict[str, Any]:
    said = [Finding("bad", f"{run.name}, step {step}: {text}") for run in runs for step, text in run.alarms]
    said += [Finding("info", f"{run.name}: {text}") for run in runs for text in run.missing]
    head = ["", arms[0].name]
    for arm in arms[1:]:
        head += [arm.name, "difference"]
    tables = [
        {
            "title": "Results",
            "note": f"mean ± standard deviation over seeds; at the end: mean of the last {WINDOW} steps "
            "(of a short run: of its second half)" + (f"; differences to {arms[0].name!r}" if len(arms) > 1 else ""),
            "head": head,
            "rows": _rows(arms, table),
            "numeric": list(range(1, len(head))),
        },
        {
            "title": "Runs",
            "note": f"runs that differ only in {' and '.join(IGNORED)} are seeds of one configuration",
            "head": ["configuration", "runs", "steps"],
            "rows": [
                [arm.name, ", ".join(run.name for run in arm.runs), ", ".join(str(run.steps) for run in arm.runs)]
                for arm in arms
            ],
        },
    ]
    if differing:
        tables.append(
            {
                "title": "Settings that differ",
                "note": "",
                "head": ["", *(arm.name for arm in arms)],
                "rows": [[key, *values] for key, values in differing],
            }
        )
    last = max(run.steps for run in runs)
    return {
        "name": "Comparison",
        "subtitle": f"{len(runs)} runs, {len(arms)} configurations"
        if len(arms) > 1
        else f"{len(runs)} seeds"
        if len(runs) > 1
        else "1 run",
        "tiles": [],
        "findings": [asdict(finding) for finding in said],
        "charts": [chart_data(chart) for chart in _charts(arms)],
        "first_step": 0,
        "last_step": last,
        "smooth": last > SMOOTH,
        "marks": [],
        "tables": tables,
        "spending": [],
        "groups": [],
        "rule": "",
        "mark_names": {},
        "settings": [],
        "footer": "Written by rlme from the runs' folders. No network was used.",
    }

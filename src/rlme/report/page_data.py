"""What the page of one run contains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlme.report import html
from rlme.report.content import Chart, Finding, Series, best_heldout, charts, duration, findings, spending, tiles
from rlme.report.run import READ, Run, read_run
from rlme.report.samples import MARKS, choose
from rlme.result_files import check_writable
from rlme.training.monitors import best_step

SMOOTH = 60
"""Runs of more steps are drawn smoothed at first."""


def write_report(run_folder: Path, output: Path | None = None, table: Path | None = None) -> Path:
    """Write the page of a run, by default as `report.html` in its folder. Returns its path.

    `table`: a file that is written afterwards, and tried here with the page.
    """
    run = read_run(run_folder)
    output = output or run_folder / "report.html"
    check_writable(output, table, inputs=[run_folder / name for name in READ])
    output.write_bytes(html.render(f"{run.name} - rlme", page_data(run)))
    return output


def page_data(run: Run) -> dict[str, Any]:
    """Everything the page shows, as JSON-ready data."""
    samples = choose(run)
    missing = [Finding("info", text) for text in [*run.missing, *samples.missing]]
    marks: list[dict[str, Any]] = [{"step": step, "kind": "alarm", "label": "alarm"} for step, _ in run.alarms]
    if best := best_heldout(run):
        step = best_step(best[1])
        if step:
            marks.append({"step": step, "kind": "best", "label": "best"})
    return {
        "name": run.name,
        "subtitle": _subtitle(run),
        "tiles": [asdict(tile) for tile in tiles(run)],
        "findings": [asdict(finding) for finding in [*findings(run), *missing]],
        "charts": [chart_data(chart) for chart in charts(run)],
        "first_step": min((record["step"] for record in run.records), default=0),
        "last_step": run.steps,
        "smooth": run.steps > SMOOTH,
        "marks": marks,
        "tables": [],
        "spending": _spending(run),
        "groups": samples.groups,
        "rule": samples.rule,
        "mark_names": MARKS,
        "settings": _settings(run),
        "footer": _footer(run),
    }


def chart_data(chart: Chart) -> dict[str, Any]:
    """A chart as the script wants it; numbers with six significant digits."""
    return {
        "title": chart.title,
        "note": chart.note,
        "share": chart.share,
        "minor": chart.minor,
        "series": [_series_data(series) for series in chart.series],
    }


def _series_data(series: Series) -> dict[str, Any]:
    def cut(values: list[float]) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    return {
        "name": series.name,
        "steps": series.steps,
        "values": cut(series.values),
        "points": series.points,
        "dashed": series.dashed,
        "band": None if series.band is None else [cut(series.band[0]), cut(series.band[1])],
        "group": series.group,
    }


def _subtitle(run: Run) -> str:
    model = run.section("model").get("path")
    started = str(run.info.get("started", ""))[:16].replace("T", " ")
    return ", ".join(str(part) for part in (model, started) if part)


def _spending(run: Run) -> list[dict[str, Any]]:
    spent = spending(run)
    result: list[dict[str, Any]] = []
    total = sum(spent.seconds.values())
    if total > 0:
        rows = [
            [
                stage,
                duration(s),
                s / total,
                f"{spent.per_second[stage]:,.0f} tokens/s" if stage in spent.per_second else "",
            ]
            for stage, s in spent.seconds.items()
        ]
        result.append({"title": f"Time: {duration(total)}", "rows": rows})
    rows = [[name, f"{count:,.0f}", None, ""] for name, count in spent.tokens.items()]
    if spent.peak_mb is not None:
        rows.append(["peak memory", f"{spent.peak_mb / 1024:.1f} GiB", None, ""])
    if spent.cost is not None:
        rows.append(["cost of judging", f"{spent.cost:,.4g}", None, "as priced in the configuration"])
    if rows:
        result.append({"title": "Tokens", "rows": rows})
    return result


def _settings(run: Run) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    if run.config:
        result.append(
            {"title": "Configuration", "text": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)}
        )
    if run.info:
        versions = run.info.get("versions")
        flat = {k: v for k, v in run.info.items() if k != "versions"} | (versions if isinstance(versions, dict) else {})
        result.append({"title": "Versions and machine", "rows": [[str(k), str(v)] for k, v in flat.items()]})
    return result


def _footer(run: Run) -> str:
    version = run.info.get("rlme")
    made = f", which rlme {version} made" if version else ""
    return f"Written by rlme from the run's folder{made}. No network was used."

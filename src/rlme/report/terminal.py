"""A run in the terminal: the same findings, key numbers, curves and totals as the page, live or once."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlme.report.content import Chart, Series, charts, duration, findings, short, spending, tiles
from rlme.report.run import Run, read_run

STYLES = {"bad": "bold red", "warn": "yellow", "good": "green", "info": "cyan"}
WORDS = {"bad": "Alarm", "warn": "Look", "good": "Fine", "info": "Note"}
BARS = "▁▂▃▄▅▆▇█"


def plain(text: str) -> str:
    """Text that cannot drive the terminal: names and sentences of a run may hold what a model wrote."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def sparkline(series: Series, width: int) -> str:
    """The curve in one line of `width` block characters, from its lowest to its highest value; gaps stay empty."""
    first, last = series.steps[0], series.steps[-1]
    buckets: list[list[float]] = [[] for _ in range(width)]
    for step, value in zip(series.steps, series.values, strict=True):
        buckets[round((step - first) / max(last - first, 1) * (width - 1))].append(value)
    means = [math.fsum(b) / len(b) if b else None for b in buckets]
    known = [m for m in means if m is not None]
    low, span = min(known), (max(known) - min(known)) or 1.0
    line, before = "", " "
    for mean in means:  # a wide terminal has more places than measurements: the last one stays in view
        before = before if mean is None else BARS[min(7, int((mean - low) / span * 8))]
        line += before
    return line


def overview(run: Run, *, width: int = 120) -> RenderableType:
    """Findings, key numbers, curves, totals."""
    parts: list[RenderableType] = []
    for finding in [*findings(run)]:
        parts.append(Text.assemble((f"{WORDS[finding.level]}  ", STYLES[finding.level]), plain(finding.text)))
    parts += [Text.assemble(("Note  ", STYLES["info"]), plain(text)) for text in run.missing]
    boxes = [
        Panel(Text.assemble((tile.value, "bold"), f"\n{tile.note}" if tile.note else ""), title=tile.label, width=26)
        for tile in tiles(run)
    ]
    if boxes:
        parts.append(Columns(boxes))
    shown = charts(run)
    if shown:
        parts.append(_curves(shown, max(12, min(60, width - 78))))
    if total := _totals(run):
        parts.append(total)
    return Group(*parts)


def _curves(shown: list[Chart], width: int) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("curve", "", "first", "last", "lowest", "highest"):
        table.add_column(name, justify="left" if name in ("curve", "") else "right", no_wrap=True)
    for chart in shown:
        if chart.minor:
            continue
        table.add_row(Text(plain(chart.title), style="bold"))
        for series in chart.series:
            numbers = (series.values[0], series.values[-1], min(series.values), max(series.values))
            mark = "● " if series.points else "  "
            table.add_row(
                Text(mark + plain(series.name)),
                Text(sparkline(series, width), style="blue" if not series.dashed else "green"),
                *(short(n) for n in numbers),
            )
    return table


def _totals(run: Run) -> Text | None:
    spent = spending(run)
    parts = [f"{stage} {duration(seconds)}" for stage, seconds in spent.seconds.items()]
    parts += [f"{count:,.0f} tokens {name}" for name, count in spent.tokens.items()]
    if spent.cost is not None:
        parts.append(f"cost {short(spent.cost)}")
    return Text("\n" + ", ".join(parts), style="dim") if parts else None


def print_overview(folder: Path, console: Console | None = None) -> None:
    """Print a run once."""
    console = console or Console()
    console.print(overview(read_run(folder), width=console.width))


def write_numbers(folder: Path, path: Path) -> None:
    """The key numbers and findings as JSON."""
    run = read_run(folder)
    content = {
        "run": run.name,
        "tiles": [asdict(tile) for tile in tiles(run)],
        "findings": [asdict(finding) for finding in findings(run)],
        "missing": run.missing,
        "spending": asdict(spending(run)),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def watch(folder: Path, *, every: float, once: bool, console: Console | None = None) -> None:
    """Show a run, and show it again whenever its metrics have grown, until Ctrl-C (or the last planned step)."""
    console = console or Console()
    if once or not console.is_terminal:
        print_overview(folder, console)
        return
    metrics, seen = folder / "metrics.jsonl", -1
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            size = metrics.stat().st_size if metrics.is_file() else 0
            if size != seen:
                seen = size
                run = read_run(folder)
                title = Text.assemble((plain(run.name), "bold"), f"  step {run.steps}, Ctrl-C ends the view\n")
                live.update(Group(title, overview(run, width=console.width)), refresh=True)
            try:
                time.sleep(every)
            except KeyboardInterrupt:
                break
    print_overview(folder, console)

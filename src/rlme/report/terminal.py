"""A run in the terminal: the same findings, key numbers, curves and totals as the page, live or once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rlme.report.compare import Arm
from rlme.report.content import Chart, Series, charts, duration, findings, short, spending, tiles
from rlme.report.run import Run, read_run

STYLES = {"bad": "bold red", "warn": "yellow", "good": "green", "info": "cyan"}
WORDS = {"bad": "Alarm", "warn": "Look", "good": "Fine", "info": "Note"}
BARS = "▁▂▃▄▅▆▇█"
NUMBER = 7
"""Characters of a number in a table: -0.0123, 123,456."""


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
    numbers = [
        Text.assemble((f"{tile.label} ", "dim"), (tile.value, "bold"), (f" ({tile.note})" if tile.note else "", "dim"))
        for tile in tiles(run)
    ]
    if numbers:
        parts.append(Text(" · ", style="dim").join(numbers))
    shown = charts(run)
    if shown:
        parts += [Text(), _curves(shown, width)]
    if total := _totals(run):
        parts.append(total)
    return Group(*parts)


def _curves(shown: list[Chart], width: int) -> Table:
    """One row a curve. Names wrap and the line shrinks, down to 80 columns, so that no number is ever cut off."""
    named = max(len(series.name) for chart in shown for series in chart.series if not chart.minor) + 2
    names = min(named, max(16, width - 4 * NUMBER - 5 - 16))
    line = max(4, min(60, width - names - 4 * NUMBER - 5))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("curve", width=names)
    table.add_column("", width=line, no_wrap=True)
    for name in ("first", "last", "lowest", "highest"):
        table.add_column(name, justify="right", width=NUMBER, no_wrap=True)
    for chart in shown:
        if chart.minor:
            continue
        table.add_row(Text(plain(chart.title), style="bold"))
        for series in chart.series:
            values = (series.values[0], series.values[-1], min(series.values), max(series.values))
            mark = "● " if series.points else "  "
            table.add_row(
                Text(mark + plain(series.name)),
                Text(sparkline(series, line), style="blue" if not series.dashed else "green"),
                *(short(value) for value in values),
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


def print_comparison(arms: Sequence[Arm], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """The table of `rlme compare`. Configurations have long names: the columns are called A, B, ...

    Where not all fit side by side the table is split, the others below: a number is never cut off.
    """
    console = console or Console()
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(arms))]
    for letter, arm in zip(letters, arms, strict=True):
        console.print(Text(f"{letter}  {plain(arm.name)}: {', '.join(plain(run.name) for run in arm.runs)}"))
    heads = [letters[0], *(head for letter in letters[1:] for head in (letter, f"{letter} - A"))]
    unlimited = console.options.update(width=10_000)

    def part(columns: Sequence[int]) -> tuple[Table, int]:
        """Some of the columns, and the width below which a number of theirs would be cut off."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", min_width=16)
        for k in columns:
            table.add_column(heads[k], justify="right", no_wrap=True, style="dim" if k and k % 2 == 0 else "")
        for row in rows:
            table.add_row(plain(row[0]), *(row[k + 1] for k in columns))
        return table, console.measure(table, options=unlimited).minimum

    parts: list[list[int]] = [[0]]
    for k in range(1, len(heads), 2):
        if part([*parts[-1], k, k + 1])[1] <= console.width:
            parts[-1] += [k, k + 1]
        else:
            parts.append([k, k + 1])
    for columns in parts:
        table, needed = part(columns)
        if needed > console.width:
            table.width = needed
        console.print(table, crop=False)


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


@dataclass
class Fit:
    """As much of something as the screen has lines, and a sentence when that is not all."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.what, options, pad=False)
        room = max(2, console.height - 1)
        cut = len(lines) > room
        for line in lines[: room - 1] if cut else lines:
            yield from line
            yield Segment.line()
        if cut:
            yield Text(f"{len(lines) - room + 1} more lines in a taller terminal, or with --once", style="dim italic")


def watch(folder: Path, *, every: float, once: bool, console: Console | None = None) -> None:
    """Show a run, and show it again whenever its metrics have grown, until its last planned step or Ctrl-C."""
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
                planned = run.section("train").get("steps")
                if isinstance(planned, int) and run.steps >= planned:
                    break
                title = Text.assemble((plain(run.name), "bold"), f"  step {run.steps}, Ctrl-C ends the view\n")
                live.update(Fit(Group(title, overview(run, width=console.width))), refresh=True)
            try:
                time.sleep(every)
            except KeyboardInterrupt:
                break
    print_overview(folder, console)

"""Commands `rlme report`, `rlme compare` and `rlme watch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/NAME.")]


def report(
    run: RunFolderArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write. Default: RUN/report.html.")
    ] = None,
    table: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the key numbers.")] = None,
) -> None:
    """Write one HTML page about a run: curves, findings in words, where time and tokens went, a sample browser.

    The page is a single file that asks the network for nothing. It can be written while the run goes on.
    """
    from rlme.report.page_data import write_report
    from rlme.report.terminal import print_overview, write_numbers

    path = write_report(run, output, table)
    print_overview(run)
    if table is not None:
        write_numbers(run, table)
    typer.echo(f"Page: {path}")


def watch(
    run: RunFolderArgument,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the folder.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once instead of following it.")] = False,
) -> None:
    """Follow a run in the terminal: the same findings, numbers and curves as its page."""
    from rlme.report import terminal

    terminal.watch(run, every=every, once=once)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Folders of two or more runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")] = Path(
        "compare.html"
    ),
    table: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table.")] = None,
) -> None:
    """Lay runs over each other on one page: seeds of one configuration as a band, differences as a table."""
    from rich.console import Console

    from rlme.report.compare import write_comparison
    from rlme.report.terminal import print_comparison

    console = Console(width=None if sys.stdout.isatty() else 180)  # tables in a log are not folded
    print_comparison(*write_comparison(runs, output, table), console)
    typer.echo(f"Page: {output}")

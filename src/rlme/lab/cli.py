"""Command `rlme lab`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def lab(
    name: Annotated[
        str,
        typer.Argument(help="fig2 ... fig7, table1, table2 or all; report: page and plots; build, gates: base models."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run, instead of the experiment's.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm. Repeatable.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where runs (or built models) go.")] = Path("runs/lab"),
    docs: Annotated[Path, typer.Option(metavar="DIR", help="Where `report` writes lab.md and images/.")] = Path("docs"),
) -> None:
    """The paper's experiments in a world small enough for two CPU cores, beside the paper's own curves.

    What is there already is not run again, and an interrupted run goes on. Tables are printed, plots lie in DIR/lab.md.
    """
    from rlme.commands import _console, _quiet
    from rlme.result_files import check_writable

    _quiet()
    console = _console()
    if name == "build":
        from rlme.lab.build import build_models

        check_writable(out / "config.json")
        build_models(out, console)
    elif name == "gates":
        from rlme.lab.build import show_gates

        show_gates(console)
    elif name == "report":
        from rlme.lab.report import write_page

        check_writable(docs / "lab.md")
        page = write_page(out, docs)
        console.print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)
    else:
        from rlme.lab.report import summary, write_page
        from rlme.lab.run import find, run_experiments

        experiments = find(name)
        check_writable(out / "lab.md")
        run_experiments(experiments, out, seeds=seeds, steps=steps, arms=arm or [], console=console)
        console.print(f"\n{summary(out, experiments)}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"With plots: {write_page(out, out)}", markup=False, highlight=False, soft_wrap=True)

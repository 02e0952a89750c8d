"""`rlme align`: from references to an aligned model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def align(
    config: Annotated[str, typer.Argument(help="Configuration file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: section.key=value. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run's folder.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the file; load nothing.")] = False,
    table: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the win rates as JSON.")
    ] = None,
) -> None:
    """Align a model to reference outputs: SFT, on-policy samples, a reference-guided judge, DPO, and a comparison.

    Run it again to go on: finished stages are skipped, an interrupted one continues where it was.
    """
    from rich.console import Console

    from rlme.align.config import AlignConfig
    from rlme.commands import find_config
    from rlme.config_file import apply_overrides, read_yaml, validate

    path = find_config(config)
    content = apply_overrides(read_yaml(path), overrides or [])
    content.setdefault("output", f"runs/{path.stem}")
    if output is not None:
        content["output"] = str(output)
    settings = validate(AlignConfig, content, str(path))
    for key in ("train", "eval"):  # data files may be given relative to the configuration's folder
        value = getattr(settings.data, key)
        if value and not Path(value).exists() and (path.parent / value).is_file():
            setattr(settings.data, key, str(path.parent / value))
    console = Console(width=None if sys.stdout.isatty() else 180)  # tables in a log are not folded
    if check:
        console.print(f"{path}: fine", markup=False)
        return

    from rlme.align.pipeline import Alignment
    from rlme.align.winrates import cells, columns
    from rlme.commands import _quiet
    from rlme.errors import RunStopped
    from rlme.result_files import check_writable
    from rlme.training.display import print_table

    check_writable(table)
    _quiet()
    try:
        rows = Alignment(settings, console).run()
    except KeyboardInterrupt:
        raise RunStopped(f"interrupted; the same command goes on with what is in {settings.folder}") from None
    if rows:
        print_table(console, "win rates", columns(), [cells(row) for row in rows])
    if table is not None:
        table.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(f"folder: {settings.folder}", markup=False, highlight=False)

"""The command line: one short function per command; heavy imports inside, so that `rlme --help` is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlme.align.cli import align
from rlme.ask_cli import ask, select
from rlme.judgebench.cli import judge_bench
from rlme.lab.cli import lab
from rlme.report.cli import compare, report, watch
from rlme.serve.cli import cache_clear, cache_stats, serve

app = typer.Typer(
    name="rlme",
    help="Train language models by reinforcement learning from questions in plain language: no labels, no verifier.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file: section.key=value. Repeatable."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table as JSON.")]


@app.command()
def train(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Configuration file, or the name of a shipped recipe.")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run's folder (must not exist).")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")] = None,
    table: JsonFile = None,
) -> None:
    """Train a model as a configuration file says.

    Ctrl-C ends a run after the current step with its state saved; `rlme train --resume RUN` goes on exactly where it
    stopped, as it does after a crash.
    """
    from rlme.errors import InputError

    if (config is None) == (resume is None):
        raise InputError("rlme train needs a configuration file, or --resume RUN (one of the two)")
    if resume is not None:
        if output is not None:
            raise InputError("--output names the folder of a new run; --resume goes on in its own")
        from rlme.commands import resume_run

        resume_run(resume, overrides or [], table)
    elif config is not None:
        from rlme.commands import train_config

        train_config(config, overrides or [], output, table)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/quickstart"),
    overrides: Overrides = None,
    table: JsonFile = None,
) -> None:
    """Train the built-in model on the quickstart recipe; show answers before and after (7 minutes, 2 cores)."""
    from rlme.commands import run_quickstart

    run_quickstart(output, overrides or [], table)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("rlme.yaml"),
    recipe: Annotated[str | None, typer.Option(help="Start from a shipped recipe instead.")] = None,
) -> None:
    """Write a commented starter configuration."""
    from rlme.commands import write_starter

    write_starter(path, recipe)


@app.command()
def recipes(table: JsonFile = None) -> None:
    """List the recipes that ship with the package."""
    from rlme.commands import list_recipes

    list_recipes(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration file, for editors that complete and check it."""
    from rlme.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def check(
    config: Annotated[str, typer.Argument(help="Configuration file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the file with all defaults filled in.")] = False,
) -> None:
    """Check a configuration file without loading a model."""
    from rlme.commands import check_config

    check_config(config, overrides or [], show=show)


app.command()(ask)
app.command()(select)
app.command()(report)
app.command()(compare)
app.command()(watch)
app.command("judge-bench")(judge_bench)
app.command()(align)
app.command()(lab)
app.command()(serve)

cache = typer.Typer(help="The judge cache: what it holds, and emptying it.", no_args_is_help=True)
cache.command("stats")(cache_stats)
cache.command("clear")(cache_clear)
app.add_typer(cache, name="cache")


def _version(value: bool) -> None:
    if value:
        from rlme import __version__

        typer.echo(f"rlme {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> Any:
    """Entry point. Bad input ends with one sentence and exit code 2; a run that stopped itself, with 3."""
    from rlme.errors import InputError, RunStopped

    try:
        return app(arguments, standalone_mode=True)
    except InputError as error:
        _say("error", str(error))
        sys.exit(2)
    except RunStopped as error:
        _say("stopped", str(error))
        sys.exit(3)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        _say("error", f"{error.filename}: {error.strerror}")
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            _say("stopped", "interrupted")
        raise


def _say(kind: str, sentence: str) -> None:
    sys.stderr.write(f"{kind}: {sentence}\n")  # at once: several processes may say theirs

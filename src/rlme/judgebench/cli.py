"""`rlme judge-bench`: measure judges before training on them."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from rlme.judgebench.bench import Job
    from rlme.judgebench.items import BenchSet
    from rlme.judgebench.run import Record, Run

Many = list[str] | None


def judge_bench(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the keys of BenchConfig.")] = None,
    judge: Annotated[Many, typer.Option(help="Model: hub id, folder, .gguf, builtin:NAME. Repeatable.")] = None,
    data: Annotated[
        Many,
        typer.Option(metavar="FORMAT:SOURCE", help="Labelled items: pairs|llmbar|mtbench|points|gsm8k. Repeatable."),
    ] = None,
    protocol: Annotated[
        Many, typer.Option(help="base|refeval|refmatch|vanilla|cot|reference|href|FILE. Repeatable.")
    ] = None,
    question: Annotated[Many, typer.Option(help="Asked about single answers. Repeatable.")] = None,
    column: Annotated[
        Many, typer.Option(metavar="FIELD=COLUMN", help="Column mapping for all --data. Repeatable.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B", help="Spelling of the labels, first or right one first.")
    ] = None,
    verdicts: Annotated[Path | None, typer.Option(help="Score the verdicts recorded in this file; no model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each set.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=64, help="Longest pairwise prompt; longer texts are cut.")
    ] = None,
    wrong_references: Annotated[
        bool | None, typer.Option(help="Also show wrong references and see whether verdicts move.")
    ] = None,
    resamples: Annotated[int | None, typer.Option(min=0, help="Bootstrap resamples.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of bootstrap and exchanged references.")] = None,
    overrides: Annotated[
        Many, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: section.key=value. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report and the verdicts.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all numbers as JSON.")
    ] = None,
) -> None:
    """Measure judges on labelled pairs or answers: accuracy in both orders, position and length bias, calibration."""
    from rich.console import Console

    from rlme.errors import InputError, RunStopped
    from rlme.judgebench.analysis import RESAMPLES, analyse
    from rlme.result_files import check_writable

    console = Console(width=None if sys.stdout.isatty() else 180)  # tables in a log are not folded
    check_writable(table)
    folder = output
    if verdicts is not None:
        if config is not None or judge or data or protocol or question or overrides:
            raise InputError("--verdicts scores a file of recorded verdicts: leave out judges, sets and protocols.")
        from rlme.judgebench.run import load_recorded

        spelled = labels.split(",") if labels is not None else None
        found = load_recorded(str(verdicts), columns=_mapping(column), labels=spelled, limit=limit)
        # A folder that was used with several settings holds several runs of one name.
        runs = list({(*run.key(), run.shown): run for run in found}.values())
        if len(runs) < len(found):
            left_out = len(found) - len(runs)
            console.print(f"{left_out} earlier runs of the same set, judge and protocol are left out", highlight=False)
        count, start = RESAMPLES if resamples is None else resamples, seed or 0
    else:
        from rlme.judgebench.config import BenchConfig

        content = _content(config, locals())
        from rlme.config_file import apply_overrides, validate

        content = apply_overrides(content, overrides or [])
        settings = validate(BenchConfig, content, str(config or "judge-bench"))
        folder = Path(settings.output) if settings.output else None
        sets = _sets(settings, console)  # read before a model is loaded
        count, start = settings.resamples, settings.seed
    with _held(folder):
        try:
            if verdicts is None:
                runs = _judge(settings, sets, folder, console)
        except KeyboardInterrupt:
            how = f"the same command goes on with what is in {folder}" if folder else "no --output, so nothing is kept"
            raise RunStopped(f"interrupted; {how}") from None
        result = analyse(runs, resamples=count, seed=start)
        _show(result, console)
        if folder is not None:
            _write(result, runs, folder)
            console.print(f"report: {folder / 'report.html'}   verdicts: {folder / 'verdicts.jsonl'}")
    if table is not None:
        table.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _content(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The file's mapping, with what the options say put over it."""
    from rlme.config_file import read_yaml
    from rlme.judgebench.config import parse_set

    content: dict[str, Any] = read_yaml(config) if config is not None else {}
    simple = {
        "judges": given["judge"],
        "protocols": given["protocol"],
        "questions": {text: text for text in given["question"] or []},
        "max_tokens": given["max_tokens"],
        "wrong_references": given["wrong_references"],
        "resamples": given["resamples"],
        "seed": given["seed"],
        "output": None if given["output"] is None else str(given["output"]),
    }
    content |= {key: value for key, value in simple.items() if value not in (None, [], {})}
    extra: dict[str, Any] = {"columns": _mapping(given["column"]), "limit": given["limit"]}
    if given["labels"] is not None:
        extra["labels"] = given["labels"].split(",")
    if given["data"]:
        content["sets"] = [parse_set(text) for text in given["data"]]
    if sets := content.get("sets"):
        given_options = {key: value for key, value in extra.items() if value}
        sets = [parse_set(one) if isinstance(one, str) else one for one in (sets if isinstance(sets, list) else [sets])]
        content["sets"] = [one | given_options if isinstance(one, dict) else one for one in sets]
    return content


def _mapping(pairs: Many) -> dict[str, str]:
    from rlme.errors import InputError

    found: dict[str, str] = {}
    for pair in pairs or []:
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            raise InputError(f"--column {pair!r}: expected FIELD=COLUMN, e.g. instruction=prompt.")
        found[field] = column
    return found


@contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """The folder for the report, made and this process's alone, unless it holds a run of another command, whose files
    would be overwritten.
    """
    from rlme.config_file import read_yaml
    from rlme.errors import InputError
    from rlme.folders import locked, make_folder

    if folder is None:
        yield
        return
    config = folder / "config.yaml"
    if config.is_file() and "model" in read_yaml(config):
        raise InputError(f"{folder} holds a run of rlme train or rlme align: choose another `output` (or --output)")
    make_folder(folder)
    with locked(folder, "another process is judging in it"):
        yield


def _sets(settings: Any, console: Console) -> list[BenchSet]:
    """The labelled items, with a word on what cannot be asked about them."""
    from rlme.align.protocols import load_protocol
    from rlme.judgebench.bench import load_sets, without_references

    for name in settings.protocols:
        load_protocol(name)
    sets = load_sets(settings)
    for sentence in without_references(settings, sets):
        console.print(sentence, markup=False, highlight=False)
    return sets


class _LabelMasses:
    """Says once for every judge and protocol or question that it puts little probability on the labels."""

    def __init__(self, threshold: float, console: Console) -> None:
        from rlme.label_mass import LabelMass

        self._threshold, self._console = threshold, console
        self._of_pairs, self._of_answers = LabelMass("protocol"), LabelMass("question")
        self._said: set[tuple[bool, tuple[str, str]]] = set()

    def add(self, job: Job, records: Sequence[Record]) -> None:
        """Count these records of a run in, asked now or earlier."""
        masses = self._of_pairs if job.pairwise else self._of_answers
        for record in records:
            masses.add(job.judge, job.asked, record.mass)
        for key, text in masses.warnings(self._threshold).items():
            if (job.pairwise, key) not in self._said:
                self._said.add((job.pairwise, key))
                self._console.print(text, style="yellow", markup=False, highlight=False)


def _complete(run: Run, job: Job) -> bool:
    """Whether there is nothing more to ask: items that failed for a reason that may pass are asked again."""
    passing = {"timeout", "rate_limited", "server_error", "connection"}
    return len(run.records) >= job.items and not any(passing & record.failures.keys() for record in run.records)


def _judge(settings: Any, sets: list[BenchSet], folder: Path | None, console: Console) -> list[Run]:
    """Make all runs, with the number of calls said first and every finished run on disk."""
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from rlme.align.stage import Lines
    from rlme.commands import _quiet
    from rlme.evaluators.build import build_evaluators
    from rlme.evaluators.spending import Ledger, estimates
    from rlme.judgebench.bench import expected, plan
    from rlme.judgebench.run import as_record, load_saved, save_records
    from rlme.progress import SlowProgress

    _quiet()
    ledger = None if folder is None else Ledger(folder / "spent.json")
    evaluators = build_evaluators(
        settings.judges,
        cache=settings.judging,
        max_context_tokens=settings.judging.max_context_tokens,
        spent={} if ledger is None else ledger.costs(),
    )
    jobs = list(plan(settings, sets, evaluators))
    # Runs that an earlier, perhaps interrupted, call left in the folder, by what they were made from.
    saved = [] if folder is None else load_saved(folder / "verdicts.jsonl")
    made = {run.inputs or str(run.key()): run for run in saved}
    left = [job for job in jobs if job.inputs not in made or not _complete(made[job.inputs], job)]
    reused = f" ({len(jobs) - len(left)} runs are there already)" if len(left) < len(jobs) else ""
    console.print(f"{len(left)} runs, {sum(job.calls for job in left)} judge calls{reused}", highlight=False)
    if ledger is not None:
        ledger.adopt(evaluators)
    for text, style in estimates(
        expected(settings, sets, evaluators, {job.title: job.calls for job in left}),
        how="about",
        where="in these runs",
        why="nothing cached, no retries",
    ):
        console.print(text, style=style, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    masses = _LabelMasses(settings.judging.mass_warning, console)
    for job in jobs:
        masses.add(job, made[job.inputs].records if job.inputs in made else ())
    with SlowProgress(*columns, console=console) as progress:
        whole = progress.add_task("all items", total=sum(job.items for job in left))
        for job in left:
            progress.update(whole, description=escape(job.title))
            lines = None if folder is None else Lines(folder / f"unfinished-{job.inputs}.jsonl")
            if lines is not None:
                lines.resume(1)  # nothing is written after a line that was cut off
            earlier = [as_record(row) for row in lines.read()] if lines else []
            masses.add(job, earlier)
            if job.inputs in made:  # what a file that was cut off has of it
                earlier += made[job.inputs].records
            # Failed items of an interrupted run are asked again.
            done = [record for record in earlier if not record.failures]
            progress.advance(whole, len(done))

            def advance(new: Sequence[Record], job: Job = job, lines: Lines | None = lines) -> None:
                progress.advance(whole, len(new))
                masses.add(job, new)
                if lines is not None:
                    lines.append([asdict(record) for record in new])

            with nullcontext() if ledger is None else ledger.kept():
                made[job.inputs] = replace(job.make(done, advance), inputs=job.inputs)
            if folder is not None and lines is not None:
                save_records(made.values(), folder / "verdicts.jsonl")
                lines.path.unlink(missing_ok=True)
    return [made[job.inputs] for job in jobs]


def _show(result: dict[str, Any], console: Console) -> None:
    from rlme.judgebench.report import tables
    from rlme.training.display import print_table

    for title, names, rows in tables(result):
        print_table(console, title, names, rows)


def _write(result: dict[str, Any], runs: Sequence[Run], folder: Path) -> None:
    from rlme.judgebench.report import markdown, page
    from rlme.judgebench.run import save_records

    if not (folder / "verdicts.jsonl").exists():  # else it holds these runs, and perhaps more
        save_records(runs, folder / "verdicts.jsonl")
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    (folder / "report.html").write_text(page(result), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

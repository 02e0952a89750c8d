"""Commands `rlme ask` and `rlme select`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlme.ask import Asked, Interval, Verdict
    from rlme.candidates import Groups
    from rlme.config import Config
    from rlme.evaluators.base import Evaluator
    from rlme.select import Report

CORRELATIONS = 12
"""Strongest correlations to print; --json has all."""

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="Configuration file, or a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the file: section.key=value. Repeatable."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write everything as JSON.")]
DataFile = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Completions to judge, a row each. Default: sampled from the policy."),
]
CompletionColumn = Annotated[str, typer.Option("--completion", metavar="COLUMN", help="Column with the completion.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", help="Column that says whether a completion is right.")
]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts to use.")]
Samples = Annotated[int, typer.Option(min=2, help="Completions to sample for each prompt.")]


def ask(
    config: ConfigArgument,
    overrides: Overrides = None,
    data: DataFile = None,
    completion: CompletionColumn = "completion",
    label: LabelColumn = None,
    wording: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="TEXT", help="A question to try besides the file's. Repeatable."),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option("--template", help="A template to try instead of the file's. Repeatable.")
    ] = None,
    readout: Annotated[
        list[str] | None, typer.Option("--readout", help="A read-out to try instead of the file's. Repeatable.")
    ] = None,
    prompts: Prompts = 16,
    samples: Samples = 6,
    shown: Annotated[int, typer.Option(min=0, help="Groups to show the most and least liked answer of.")] = 3,
    table: JsonFile = None,
) -> None:
    """Try questions before training: which have signal, and which have none and why.

    Asks every question of every evaluator about completions sampled from the policy, or read from a file.
    """
    from rich.console import Console

    from rlme import ask as asking
    from rlme.commands import read_config
    from rlme.errors import InputError
    from rlme.evaluators.build import make_judging, make_questions
    from rlme.judging import check_templates, readout_name
    from rlme.questions import Question
    from rlme.result_files import check_writable

    console = Console()
    settings = read_config(config, overrides or [])
    check_writable(table, inputs=_inputs(config, settings, data))
    questions = [*make_questions(settings.questions), *(Question(text) for text in dict.fromkeys(wording or []))]
    if not questions:
        raise InputError("there is no question: the configuration has none, and no --ask was given")
    variants = _variants(make_judging(settings.judging), template or [], readout or [])
    for variant in variants:  # as far as it can be known without the columns, before models are loaded
        for question in questions:
            readout_name(question, variant)
    groups, evaluators = _load(settings, data, completion, label, prompts, samples, console)
    for variant in variants:
        check_templates(questions, variant, _columns(groups))
    with _bar(console) as bar:
        task = bar.add_task("asking", total=len(variants) * len(evaluators) * len(groups))
        asked = asking.ask(
            groups, questions, evaluators, variants, shown=shown, advance=lambda done: bar.advance(task, done)
        )
    _print_asked(asked, groups, console)
    if table is not None:
        _write(table, asked.json())


def select(
    config: ConfigArgument,
    overrides: Overrides = None,
    data: DataFile = None,
    completion: CompletionColumn = "completion",
    label: LabelColumn = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts to use. Default: all of --data, 64 to sample for.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, max=25, help="Completions to sample for each prompt.")] = 4,
    accuracy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Abstain so that this share of the given answers is right."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the chosen answers as JSONL.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Splits prompts into those that set the threshold and the others.")] = 0,
    table: JsonFile = None,
) -> None:
    """Choose the best of n answers by the same questions, and abstain where the evaluator is unsure.

    With labels: accuracy against coverage, and a threshold for abstaining set on half of the prompts.
    """
    from rich.console import Console

    from rlme import select as selecting
    from rlme.commands import read_config
    from rlme.errors import InputError
    from rlme.evaluators.build import make_judging, make_questions
    from rlme.judging import check_templates
    from rlme.result_files import check_writable

    console = Console()
    settings = read_config(config, overrides or [])
    check_writable(output, table, inputs=_inputs(config, settings, data))
    questions, judging = make_questions(settings.questions), make_judging(settings.judging)
    if not questions:
        raise InputError("rlme select needs at least one question in the configuration")
    if prompts is None and data is None:
        prompts = 64
    groups, evaluators = _load(settings, data, completion, label, prompts, samples, console)
    check_templates(questions, judging, _columns(groups))
    selecting.evaluate(groups, [], accuracy=accuracy)  # said before the judging when labels are wanted and missing
    with _bar(console) as bar:
        task = bar.add_task("judging", total=len(evaluators) * len(groups))
        chosen = selecting.choose(
            groups,
            questions,
            evaluators,
            settings.evaluator_weights(),
            judging,
            advance=lambda done: bar.advance(task, done),
        )
    report = selecting.evaluate(groups, chosen, accuracy=accuracy, seed=seed)
    report.failures = chosen[-1].failures
    _print_selected(report, console)
    if output is not None:
        selecting.write_chosen(groups, chosen, report, output)
        console.print(f"chosen answers: {output}", markup=False)
    if table is not None:
        _write(table, report.json())


def _inputs(config: str, settings: Config, data: str | None) -> list[str | Path | None]:
    from rlme.commands import find_config

    return [find_config(config), settings.data.train, settings.data.eval, data]


def _columns(groups: Groups) -> list[str]:
    return sorted({name for group in groups for candidate in group for name in candidate.sample.columns})


def _variants(judging: Any, templates: list[str], readouts: list[str]) -> list[Any]:
    from dataclasses import replace
    from typing import get_args

    from rlme.errors import InputError
    from rlme.questions import TEMPLATES, ReadoutName

    for given, known, what in (
        (templates, ("auto", *TEMPLATES), "template"),
        (readouts, get_args(ReadoutName), "readout"),
    ):
        if wrong := next((n for n in given if n not in known and not (what == "template" and "{{" in n)), None):
            raise InputError(f"--{what} {wrong!r} is unknown: expected {', '.join(known)}")
    return [
        replace(judging, template=t, readout=r)
        for t in templates or [judging.template]
        for r in readouts or [judging.readout]
    ]


def _load(
    settings: Config,
    data: str | None,
    completion: str,
    label: str | None,
    prompts: int | None,
    samples: int,
    console: Console,
) -> tuple[Groups, list[Evaluator]]:
    from rlme.candidates import Policy, load_evaluators, needs_policy, read_candidates, sample_candidates
    from rlme.commands import _quiet
    from rlme.errors import InputError

    _quiet()
    if label is not None and data is None:
        raise InputError("--label names a column of --data, which was not given")
    policy = None
    with console.status("loading models"):
        if needs_policy(settings, sampling=data is None):
            policy = Policy.load(settings)
        evaluators = load_evaluators(settings, policy)
    if data is not None:
        tokenizer = policy.tokenizer if policy is not None else None
        return (
            read_candidates(settings, data, completion=completion, label=label, prompts=prompts, tokenizer=tokenizer),
            evaluators,
        )
    assert policy is not None and prompts is not None
    with console.status(f"sampling {samples} completions of up to {prompts} prompts"):
        return (
            sample_candidates(settings, policy, prompts=prompts, samples=samples, seed=settings.train.seed),
            evaluators,
        )


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from rlme.progress import SlowProgress

    return SlowProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _between(interval: Interval | None) -> str:
    return "" if interval is None or math.isnan(interval.low) else f"{interval.low:.2f}-{interval.high:.2f}"


def _print_asked(asked: Asked, groups: Groups, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from rlme.ask import conclusions
    from rlme.training.display import plain

    def line(verdict: Verdict) -> list[tuple[str, ...]]:
        """Two numbers in each cell, one below the other: the whole table fits into 80 columns."""
        v = verdict
        cells: list[tuple[str, ...]] = [
            (_number(v.probability, ".2f"), _number(v.mass, ".2f")),
            (_number(v.spread.value, ".2f"), _between(v.spread)),
            (_number(v.shift, ".2f"), str(sum(v.failures.values()))),
        ]
        if with_labels:
            cells += [
                (_number(v.auroc.value if v.auroc else None, ".2f"), _between(v.auroc)),
                (_number(v.within_group_auroc, ".2f"), _number(v.calibration_error, ".2f")),
            ]
        return [*cells, (f"{v.tokens:.0f}", f"{v.seconds * 1000:.0f}", *([_number(v.cost, ".2g")] if priced else []))]

    answers = sum(len(group) for group in groups)
    with_labels = any(v.auroc is not None for v in asked.verdicts)
    priced = any(v.cost for v in asked.verdicts)
    rows = Table(title=f"{answers} answers to {len(groups)} prompts, best question first", title_justify="left",
                 box=SIMPLE_HEAD, padding=(0, 1, 0, 0), leading=1)  # fmt: skip
    rows.add_column("question\nasked", ratio=1)
    heads = ["p(target)\nmass", "spread\n95 %", "moves\nfailed"]
    heads += ["AUROC\n95 %", "in group\ncalib."] if with_labels else []
    for name in [*heads, "tokens\nms" + ("\ncost" if priced else "")]:
        rows.add_column(name, justify="right", no_wrap=True)
    for v in asked.verdicts:
        what = Text(plain(v.question, 60), style="" if v.complaints else "bold")
        what.append(f"\n{plain(v.evaluator, 24)} {v.template}/{v.readout}", style="not bold")
        rows.add_row(what, *("\n".join(cell) for cell in line(v)), style="dim" if v.complaints else "")
    console.print(rows)
    if asked.correlations:
        same = Table(title="correlation of the scores of two questions asked in the same way", title_justify="left",
                     box=SIMPLE_HEAD)  # fmt: skip
        for name in ("question", "question", "asked", "r"):
            same.add_column(name, justify="right" if name == "r" else "left", ratio=1 if name == "question" else None)
        verdicts = {v.name: v for v in asked.verdicts}
        for first, second, r in sorted(asked.correlations, key=lambda item: -abs(item[2]))[:CORRELATIONS]:
            one, two = verdicts[first], verdicts[second]
            same.add_row(
                Text(plain(one.question, 60)), Text(plain(two.question, 60)),
                Text(f"{plain(one.evaluator, 24)} {one.template}/{one.readout}"), f"{r:.2f}",
            )  # fmt: skip
        console.print(same)
    for pair in asked.liked:
        sides = Table(title=Text(plain(pair["prompt"][-400:], 400)), title_justify="left", expand=True, show_lines=True)
        for name in ("most", "least"):
            side = pair[name]
            right = "" if side["right"] is None else ", right" if side["right"] else ", wrong"
            sides.add_column(f"{name} liked: p {_number(side['probability'])}{right}", ratio=1)
        sides.add_row(*(Text(plain(pair[name]["completion"], 600)) for name in ("most", "least")))
        console.print(sides)
    for sentence in conclusions(asked):
        console.print(Text(plain(sentence, 1000)))


def _print_selected(report: Report, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from rlme.select import sentences
    from rlme.training.display import plain

    if report.methods:
        # Two lines in the first cells and in the headers: the table fits into 80 columns.
        title = f"best of {report.answers:g} answers, {report.prompts} prompts"
        rows = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        rows.add_column("chosen by\nevaluator", ratio=1)
        rows.add_column("accuracy\n95 %", justify="right", no_wrap=True)
        for name in ("calibr.\nAUC", "select.\nAUC", "at\n50 %", "thresh-\nold", "kept", "right"):
            rows.add_column(name, justify="right", no_wrap=True)
        for m in report.methods:
            rows.add_row(
                f"{m.name}\n[dim]{escape(plain(m.evaluator, 40))}[/]",
                f"{_number(m.accuracy.value, '.2f')}\n[dim]{_between(m.accuracy)}[/]",
                _number(m.calibration_auc, ".3f"), _number(m.selective_auc, ".3f"), _number(m.at_half, ".3f"),
                _number(m.threshold), _number(m.coverage, ".0%"), _number(m.kept_accuracy, ".3f"),
            )  # fmt: skip
        console.print(rows)
    for line in sentences(report):
        console.print(Text(plain(line, 1000)))


def _write(path: Path, content: Any) -> None:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(clean(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

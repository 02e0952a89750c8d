"""The whole benchmark: every judge with every protocol on every set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

from rlme.align.judge import PairwiseJudge
from rlme.align.protocols import Protocol, load_protocol
from rlme.align.stage import fingerprint, source_fingerprint
from rlme.config import EvaluatorConfig
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import make_judging, make_questions
from rlme.evaluators.endpoint_config import SAME_VERDICTS
from rlme.evaluators.endpoint_wire import Usage
from rlme.evaluators.rehearsal import Rehearsal, spread
from rlme.evaluators.spending import paid
from rlme.judgebench.config import BenchConfig
from rlme.judgebench.items import BenchSet, PairItem, load_set
from rlme.judgebench.run import Advance, Record, Run, Shown, judge_pairs, judge_points
from rlme.judging import UNRECORDED, Judging, check_templates
from rlme.questions import Question

_SAME_VERDICTS: Any = {"weight": True, "endpoint": SAME_VERDICTS}


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be made: what it is called, how many items and calls, what it depends on, and how to make it.

    `asked` is a protocol, or the question where the items are single answers.
    """

    title: str
    judge: str
    asked: str
    pairwise: bool
    items: int
    calls: int
    inputs: str
    make: Callable[[Sequence[Record], Advance], Run]


def load_sets(config: BenchConfig) -> list[BenchSet]:
    """The sets, under different names."""
    sets = [
        load_set(
            s.source, reader=s.format, name=s.name, columns=s.columns, labels=s.labels, split=s.split, limit=s.limit
        )
        for s in config.sets
    ]
    names = [s.name for s in sets]
    if duplicate := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"two benchmark sets are called {duplicate!r}: give one of them another `name`.")
    if not config.questions and (points := next((s for s in sets if not s.pairwise), None)):
        raise InputError(f"the set {points.name!r} holds single answers: give at least one question to ask about them.")
    return sets


def without_references(config: BenchConfig, sets: list[BenchSet]) -> list[str]:
    """Sentences about what cannot be asked, as no item has a reference to show.

    Raises:
        InputError: nothing else is left to ask.
    """
    protocols = [load_protocol(name) for name in config.protocols]
    needy = [p.name for p in protocols if p.needs_reference]
    bare = [s.name for s in sets if s.pairwise and not any(i.references for i in s.items)]  # type: ignore[union-attr]
    if not needy or not bare:
        return []
    said = f"no item of {', '.join(bare)} has a reference, so {', '.join(needy)} cannot be asked there"
    if len(needy) == len(protocols) and len(bare) == len(sets):
        raise InputError(f"{said}: name the column with --column reference=COLUMN, or take a protocol without one.")
    return [said]


def plan(config: BenchConfig, sets: list[BenchSet], evaluators: list[Evaluator]) -> Iterator[Job]:
    """All runs, judge by judge; with the manipulation check where a protocol shows a reference."""
    protocols = [load_protocol(name) for name in config.protocols]
    questions = make_questions(config.questions)
    judging = make_judging(config.judging)
    for spec, evaluator in zip(config.judges, evaluators, strict=True):
        who_is_asked = _judge(spec, evaluator, config.judging.max_context_tokens)
        for bench in sets:
            who = fingerprint(who_is_asked, [asdict(item) for item in bench.items])
            if bench.pairwise:
                for protocol in protocols:
                    yield from _pair_jobs(config, bench, evaluator, protocol, who)
                continue
            check_templates(questions, judging, list(bench.items[0].columns), absent=UNRECORDED)  # type: ignore[union-attr]
            for question in questions:
                make = partial(_points, bench, evaluator, question, judging)
                title = f"{bench.name}: {evaluator.name} / {question.name}"
                inputs = fingerprint(who, asdict(question), asdict(judging))
                count = len(bench.items)
                yield Job(title, evaluator.name, question.name, False, count, count, inputs, make)


def _judge(spec: EvaluatorConfig, evaluator: Evaluator, longest: int | None) -> str:
    """A digest of what a judge's verdicts depend on: its settings, and the weights or what the server calls them."""
    weights = None if spec.model is None else source_fingerprint(spec.model, spec.revision)
    served = [one.model for one in paid([evaluator])]
    return fingerprint(spec.model_dump(mode="json", exclude=_SAME_VERDICTS), weights, served, longest)


def expected(
    config: BenchConfig, sets: list[BenchSet], evaluators: list[Evaluator], calls: Mapping[str, int]
) -> list[tuple[Any, Usage]]:
    """What the runs of these titles, with so many calls each, will take of evaluators behind endpoints."""
    few = [replace(bench, items=cast(Any, tuple(bench.items[i] for i in spread(len(bench.items))))) for bench in sets]
    found: list[tuple[Any, Usage]] = []
    for spec, evaluator in zip(config.judges, evaluators, strict=True):
        for served in paid([evaluator]):
            rehearsal, total = Rehearsal(served), Usage()
            try:
                for job in plan(config.model_copy(update={"judges": [spec]}), few, [rehearsal]):
                    if job.title in calls:
                        rehearsal.usage = Usage()
                        job.make([], lambda new: None)
                        total = total.plus(rehearsal.usage.times(calls[job.title] / job.calls))
            except ConnectionError:  # it cannot count
                continue
            found.append((served, total))
    return found


def _pair_jobs(
    config: BenchConfig, bench: BenchSet, evaluator: Evaluator, protocol: Protocol, who: str
) -> Iterator[Job]:
    judge = PairwiseJudge(
        [evaluator],
        protocol,
        vote=config.vote,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        critique_tokens=config.critique_tokens,
    )
    items = cast("tuple[PairItem, ...]", bench.items)
    needs = protocol.needs_reference
    asked = [item for item in items if item.references] if needs else list(items)
    if not asked:
        return  # said by `without_references`
    ways: tuple[Shown, ...] = ("given", "other", "worse") if needs and config.wrong_references else ("given",)
    if len({item.instruction for item in asked}) < 2:
        ways = tuple(way for way in ways if way != "other")
    for shown in ways:
        references = 1 if shown == "worse" or not needs else None
        calls = 2 * sum(references or len(item.references) for item in asked)
        title = f"{bench.name}: {evaluator.name} / {protocol.name}"
        title += {"given": "", "other": ", another item's reference", "worse": ", the worse output as reference"}[shown]
        how = [config.vote, config.max_tokens, config.too_long, config.critique_tokens]
        inputs = fingerprint(who, asdict(protocol), how, shown, config.seed if shown == "other" else None)
        make = partial(_pairs, bench, judge, evaluator.name, shown, config.seed)
        yield Job(title, evaluator.name, protocol.name, True, len(asked), calls, inputs, make)


def _pairs(
    bench: BenchSet,
    judge: PairwiseJudge,
    name: str,
    shown: Shown,
    seed: int,
    done: Sequence[Record],
    advance: Advance,
) -> Run:
    return judge_pairs(bench, judge, name=name, shown=shown, seed=seed, done=done, advance=advance)


def _points(
    bench: BenchSet,
    evaluator: Evaluator,
    question: Question,
    judging: Judging,
    done: Sequence[Record],
    advance: Advance,
) -> Run:
    return judge_points(bench, evaluator, question, judging, done=done, advance=advance)

"""Asking judges about labelled items, and reading back verdicts that were recorded elsewhere.

A *run* is one judge with one protocol (or question) on one set. Its records are plain data; all metrics are
computed from them, so that recorded verdicts are scored exactly like fresh ones.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlme.align.judge import Comparison, PairwiseJudge, choice
from rlme.align.stage import Lines
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.folders import replace_file
from rlme.judgebench.items import BenchSet, PairItem, PointItem, load_set
from rlme.judging import Judging, Sample, judge
from rlme.questions import Question
from rlme.rows import load_rows

Shown = Literal["given", "other", "worse"]
"""Which reference the judge saw: the item's own, another item's, or the worse output itself."""
CHUNK = 8
"""Items in one call: few enough for a moving progress bar, enough to share work."""


@dataclass(frozen=True, slots=True)
class Record:
    """One item's verdict.

    Pairs: `given` and `swapped` are p(output 1 better) in each presentation order. Single answers: `given` is
    p(the answer is right). `label` is the labelled side (True: output 1, or right). `lengths` are characters.
    """

    item: int
    cluster: str
    label: bool
    lengths: tuple[int, ...]
    given: float | None
    swapped: float | None = None
    mass: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    shortened: bool = False
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    @property
    def judged(self) -> bool:
        """Whether every reading this record needs was had."""
        return self.given is not None and (len(self.lengths) == 1 or self.swapped is not None)

    @property
    def p(self) -> float | None:
        """The probability behind the verdict: for pairs the mean of both orders."""
        if self.given is None or len(self.lengths) == 1:
            return self.given
        return None if self.swapped is None else (self.given + self.swapped) / 2


@dataclass(frozen=True, slots=True)
class Run:
    """The records of one judge with one protocol on one set.

    `soft` tells probabilities from recorded choices (1 or 0). `unasked` items had no reference to show. `shown` is the
    reference the judge saw, `inputs` a digest of all that the verdicts depend on.
    """

    set: str
    judge: str
    protocol: str
    records: tuple[Record, ...]
    pairwise: bool
    soft: bool = True
    shown: Shown = "given"
    unasked: int = 0
    skipped: int = 0
    seconds: float | None = None
    inputs: str = ""

    def key(self) -> tuple[str, str, str]:
        """What identifies the run in a table."""
        return self.set, self.judge, self.protocol


Advance = Callable[[Sequence[Record]], None]
"""Told of every chunk of new records: to move a progress bar and to keep them."""


def judge_pairs(
    bench: BenchSet,
    judge_: PairwiseJudge,
    *,
    name: str,
    shown: Shown = "given",
    seed: int = 0,
    done: Sequence[Record] = (),
    advance: Advance,
) -> Run:
    """Ask a pairwise judge about every pair, both orders; with a wrong reference if `shown` says so.

    Items in `done` (from an interrupted attempt) are not asked again.
    """
    items = [item for item in bench.items if isinstance(item, PairItem)]
    needs = judge_.protocol.needs_reference
    asked = [i for i, item in enumerate(items) if item.references or not needs]
    references = _references(items, asked, shown, seed)
    records = list(done)
    for chunk in _chunks(asked, done):
        started, new = time.perf_counter(), []
        comparisons = [
            Comparison(items[i].instruction, items[i].output_1, items[i].output_2, references[i]) for i in chunk
        ]
        for i, verdict in zip(chunk, judge_.judge(comparisons), strict=True):
            masses = [r.mass for r in verdict.readings if r.mass is not None]
            new.append(
                Record(
                    item=i,
                    cluster=items[i].cluster,
                    label=items[i].label == 1,
                    lengths=(len(items[i].output_1), len(items[i].output_2)),
                    given=verdict.given,
                    swapped=verdict.swapped,
                    mass=sum(masses) / len(masses) if masses else None,
                    failures=dict(verdict.failures),
                    shortened=verdict.shortened,
                    tokens_in=sum(r.tokens_in for r in verdict.readings),
                    tokens_cached=sum(r.tokens_cached for r in verdict.readings),
                    tokens_out=sum(r.tokens_out for r in verdict.readings),
                    cost=sum(r.cost for r in verdict.readings),
                )
            )
        records += _timed(new, started)
        advance(records[-len(chunk) :])
    return Run(
        bench.name,
        name,
        judge_.protocol.name,
        _in_order(records),
        pairwise=True,
        shown=shown,
        unasked=len(items) - len(asked),
        skipped=bench.skipped,
        seconds=sum(r.seconds for r in records),
    )


def judge_points(
    bench: BenchSet,
    evaluator: Evaluator,
    question: Question,
    judging: Judging,
    *,
    done: Sequence[Record] = (),
    advance: Advance,
) -> Run:
    """Ask one question about every answer not in `done`; p is the probability of the question's target."""
    items = [item for item in bench.items if isinstance(item, PointItem)]
    records = list(done)
    for chunk in _chunks(range(len(items)), done):
        started, new = time.perf_counter(), []
        samples = [Sample(items[i].prompt, items[i].answer, columns=items[i].columns) for i in chunk]
        for i, (verdict,) in zip(chunk, judge(samples, [question], [evaluator], judging), strict=True):
            new.append(
                Record(
                    item=i,
                    cluster=items[i].cluster,
                    label=items[i].label,
                    lengths=(len(items[i].answer),),
                    given=None if verdict.failed else verdict.probability,
                    mass=verdict.mass,
                    failures={} if verdict.failure is None else {verdict.failure.value: 1},
                    tokens_in=verdict.tokens_in,
                    tokens_cached=verdict.tokens_cached,
                    tokens_out=verdict.tokens_out,
                    cost=verdict.cost,
                )
            )
        records += _timed(new, started)
        advance(records[-len(chunk) :])
    return Run(
        bench.name,
        evaluator.name,
        question.name,
        _in_order(records),
        pairwise=False,
        skipped=bench.skipped,
        seconds=sum(r.seconds for r in records),
    )


def save_records(runs: Iterable[Run], path: Path) -> None:
    """One JSON line per run's header and per record, put in place by one rename; `load_recorded` reads it back."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows.append({"run": {k: v for k, v in asdict(run).items() if k != "records"}})
        rows += map(asdict, run.records)
    Lines(path).rewrite(rows)


def load_saved(path: Path) -> list[Run]:
    """What `save_records` left there, if anything. A last line that was cut off is removed from the file, so the last
    run may lack records.
    """
    content = path.read_bytes() if path.is_file() else b""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except ValueError:
        content = content[: -len(last)]
        replace_file(path, content)
    return load_recorded(str(path)) if content.strip() else []


def load_recorded(
    source: str,
    *,
    reader: str = "pairs",
    columns: dict[str, str] | None = None,
    labels: Sequence[Any] | None = None,
    limit: int | None = None,
) -> list[Run]:
    """Verdicts recorded elsewhere, or by `save_records`.

    A benchmark file with recorded verdicts has, beside the columns of its reader, one or more columns that
    hold both orders' verdicts, keyed by whether the outputs were swapped: `{"False": "1", "True": "2"}`. Each
    names the output preferred, in the item's own numbering; null is a missing verdict. The column
    `gpt4_verdicts` is judge `gpt4`.

    Raises:
        InputError: no such column, or a value that is no verdict.
    """
    table = load_rows(source, limit=limit)
    rows = table.records
    if "run" in table.columns:
        if columns or labels or limit is not None:
            raise InputError(
                f"{source} holds the verdicts of an earlier run: leave out --column, --labels and --limit."
            )
        return _saved(rows, source)
    bench = load_set(source, reader=reader, columns=columns, labels=labels, limit=limit)
    names = [c for c, v in rows[0].items() if isinstance(v, dict) and set(v) == {"False", "True"}]
    if not bench.pairwise or not names:
        raise InputError(
            f"{source}: no recorded verdicts; expected a column of pairs like "
            '{"False": "1", "True": "2"} (key: outputs swapped?), or the verdicts.jsonl of an earlier run.'
        )
    return [_from_column(bench, rows, column, source) for column in names]


def _from_column(bench: BenchSet, rows: Sequence[dict[str, Any]], column: str, source: str) -> Run:
    if len(rows) != len(bench.items):
        raise InputError(f"{source}: rows whose label is a tie cannot be scored with recorded verdicts; remove them.")
    records = []
    for i, (row, item) in enumerate(zip(rows, bench.items, strict=True)):
        assert isinstance(item, PairItem)
        verdicts = row.get(column)
        if not isinstance(verdicts, dict) or not {"False", "True"} <= set(verdicts):
            raise InputError(
                f"{source}, row {i + 1}: {column!r} is {verdicts!r}; expected verdicts for False and True."
            )
        known = {"1": 1.0, "2": 0.0, "None": None}
        given, swapped = (str(verdicts[key]) for key in ("False", "True"))
        for verdict in (given, swapped):
            if verdict not in known:
                raise InputError(
                    f"{source}, row {i + 1}: {column!r} has the verdict {verdict!r}; expected 1, 2 or null."
                )
        missing = (given, swapped).count("None")
        records.append(
            Record(
                item=i,
                cluster=item.cluster,
                label=item.label == 1,
                lengths=(len(item.output_1), len(item.output_2)),
                given=known[given],
                swapped=known[swapped],
                failures={"malformed": missing} if missing else {},
            )
        )
    judge_name = column.removesuffix("_verdicts").removesuffix("verdicts") or "recorded"
    return Run(bench.name, judge_name, "recorded", tuple(records), pairwise=True, soft=False)


def _saved(rows: Sequence[dict[str, Any]], source: str) -> list[Run]:
    runs: list[tuple[dict[str, Any], list[Record]]] = []
    try:
        for row in rows:
            if row["run"] is not None:
                runs.append((row["run"], []))
            else:
                runs[-1][1].append(as_record(row))
        return [Run(**header, records=tuple(records)) for header, records in runs]
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"{source}: not a verdicts file of this version ({error}).") from None


def choices(run: Run) -> dict[int, tuple[int | None, int | None, int | None]]:
    """Per item: the output preferred (1, 2, 0 for a tie) as given, swapped, and by the mean of both."""
    return {r.item: (choice(r.given), choice(r.swapped), choice(r.p)) for r in run.records}


def failures(run: Run) -> Counter[str]:
    """Failed readings by kind."""
    total: Counter[str] = Counter()
    for record in run.records:
        total.update(record.failures)
    return total


def _references(items: Sequence[PairItem], asked: Sequence[int], shown: Shown, seed: int) -> dict[int, tuple[str, ...]]:
    if shown == "given":
        return {i: items[i].references for i in asked}
    if shown == "worse":
        return {i: (items[i].output_2 if items[i].label == 1 else items[i].output_1,) for i in asked}
    order = list(asked)
    random.Random(seed).shuffle(order)
    found: dict[int, tuple[str, ...]] = {}
    for position, i in enumerate(order):
        # The next item along a random circle that was asked something else.
        circle = order[position + 1 :] + order[:position]
        other = next((j for j in circle if items[j].instruction != items[i].instruction), None)
        if other is None:
            raise InputError("the manipulation check needs at least two different instructions to exchange references.")
        found[i] = items[other].references
    return found


def as_record(row: Mapping[str, Any]) -> Record:
    """A record from its JSON form."""
    return Record(**{f.name: row[f.name] for f in fields(Record)} | {"lengths": tuple(row["lengths"])})


def _timed(records: Sequence[Record], started: float) -> list[Record]:
    share = (time.perf_counter() - started) / len(records)
    return [replace(record, seconds=share) for record in records]


def _in_order(records: Sequence[Record]) -> tuple[Record, ...]:
    return tuple(sorted(records, key=lambda r: r.item))


def _chunks(indices: Iterable[int], done: Sequence[Record]) -> Iterable[list[int]]:
    asked = {record.item for record in done}
    iterator = (i for i in indices if i not in asked)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk

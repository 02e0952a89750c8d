"""What judges are measured on: labelled pairs and labelled answers, from JSONL, CSV, Parquet or a hub
dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlme.errors import InputError
from rlme.rows import load_rows
from rlme.templating import nearest


@dataclass(frozen=True, slots=True)
class PairItem:
    """Two outputs for an instruction; `label` is 1 or 2, the better one. Items of one `cluster` are not
    independent.
    """

    instruction: str
    output_1: str
    output_2: str
    label: int
    references: tuple[str, ...] = ()
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class PointItem:
    """An answer that is right (`label`) or not. `columns` are the row's other columns, which questions may
    show.
    """

    prompt: str
    answer: str
    label: bool
    columns: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class BenchSet:
    """One set of labelled items, all of the same kind. `skipped` counts rows without a verdict (ties)."""

    name: str
    items: tuple[PairItem, ...] | tuple[PointItem, ...]
    skipped: int = 0

    @property
    def pairwise(self) -> bool:
        """Whether the items are pairs."""
        return isinstance(self.items[0], PairItem)


@dataclass(frozen=True, slots=True)
class Reader:
    """Names the columns of a known format; the first name that a row has is taken."""

    columns: Mapping[str, tuple[str, ...]]
    pairwise: bool = True


_PAIRS = {
    "instruction": ("instruction", "input", "prompt", "question"),
    "output_1": ("output_1", "response_1", "output_a"),
    "output_2": ("output_2", "response_2", "output_b"),
    "label": ("label", "winner"),
    "reference": ("reference", "references"),
}
_POINTS = {
    "prompt": ("prompt", "question", "instruction"),
    "answer": ("answer", "solution", "completion", "output"),
    "label": ("label", "is_correct", "correct"),
    "reference": ("reference",),
}
READERS: dict[str, Reader] = {
    "pairs": Reader(_PAIRS),
    "llmbar": Reader(_PAIRS),
    "mtbench": Reader(_PAIRS),
    "points": Reader(_POINTS, pairwise=False),
    "gsm8k": Reader(
        {
            "prompt": ("question",),
            "answer": ("solution",),
            "label": ("is_correct",),
            "reference": ("reference",),
        },
        pairwise=False,
    ),
}
_OPTIONAL = {"reference"}

# Spellings of (first, second) or (right, wrong). A file has to keep to one row of its table.
_PAIR_SPELLINGS: tuple[tuple[Any, Any], ...] = (
    (1, 2),
    ("1", "2"),
    ("a", "b"),
    ("A", "B"),
    ("output_1", "output_2"),
    ("model_a", "model_b"),
    ("model_1", "model_2"),
    ("first", "second"),
)
_POINT_SPELLINGS: tuple[tuple[Any, Any], ...] = (
    (True, False),
    (1, 0),
    ("1", "0"),
    ("true", "false"),
    ("True", "False"),
    ("yes", "no"),
    ("Yes", "No"),
    ("YES", "NO"),
    ("correct", "incorrect"),
    ("right", "wrong"),
)
_TIES = {"tie", "Tie", "tie (inconsistent)", "both", "neither"}


def load_set(
    source: str,
    *,
    reader: str = "pairs",
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[Any] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> BenchSet:
    """Read a set of labelled items.

    Args:
        source: .jsonl, .json (a list), .csv or .parquet file, or a hub dataset id.
        reader: what the rows look like; one of READERS.
        name: in tables; default: the file's stem.
        columns: field -> column, where the reader's own names do not fit.
        labels: how the two labels are spelled, the first (or right) one first; default: recognised.
        split: of a hub dataset.
        limit: only the first rows.

    Raises:
        InputError: unknown reader, unreadable source, missing column, empty or broken text, unknown or mixed
            label spellings.
    """
    if reader not in READERS:
        raise InputError(
            f"unknown benchmark set format {reader!r}{nearest(reader, READERS)}; expected one of {', '.join(READERS)}."
        )
    form = READERS[reader]
    unknown = next((f for f in columns or {} if f not in form.columns), None)
    if unknown is not None:
        raise InputError(
            f"column mapping for {source}: {unknown!r} is no field of the format {reader!r}"
            f"{nearest(unknown, form.columns)}; its fields are {', '.join(form.columns)}."
        )
    table = load_rows(source, split=split, limit=limit)
    rows, numbers = table.records, table.numbers
    if reader == "mtbench":
        rows = [_flat_mtbench(row, n, source) for n, row in zip(numbers, rows, strict=True)]
    where = _columns_of(rows[0], form, columns or {}, source)
    raw = [_label(row, where["label"], n, source) for n, row in zip(numbers, rows, strict=True)]
    kept = [i for i, label in enumerate(raw) if not (form.pairwise and label in _TIES)]
    if not kept:
        raise InputError(f"{source}: every row is a tie, so there is nothing to measure a judge on.")
    spelling = _spelling([raw[i] for i in kept], labels, form.pairwise, source, where["label"])
    build = _pair if form.pairwise else _point
    items = [build(rows[i], raw[i] == spelling[0], where, numbers[i], source) for i in kept]
    for i in kept:
        _check_unicode(rows[i], where.values() if form.pairwise else rows[i], numbers[i], source)
    return BenchSet(name or Path(source).stem, tuple(items), len(rows) - len(kept))  # type: ignore[arg-type]


def _columns_of(row: Mapping[str, Any], form: Reader, given: Mapping[str, str], source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, candidates in form.columns.items():
        column = given.get(name) or next((c for c in candidates if c in row), None)
        if column is not None and (column in row or name not in given):
            found[name] = column
        elif name in given or name not in _OPTIONAL:
            raise InputError(
                f"{source}: no column {given.get(name, candidates[0])!r} for {name!r}; its columns are "
                f"{', '.join(row)}. Map it with --column {name}=COLUMN."
            )
    return found


def _field(row: Mapping[str, Any], column: str, index: int, source: str) -> Any:
    if row.get(column) is None:
        raise InputError(f"{source}, row {index}: the column {column!r} is missing or empty.")
    return row[column]


def _label(row: Mapping[str, Any], column: str, index: int, source: str) -> str | int | float:
    value = _field(row, column, index, source)
    if not isinstance(value, str | int | float):
        raise InputError(f"{source}, row {index}: the column {column!r} is {value!r}, expected one label, not several.")
    return value


def _check_unicode(row: Mapping[str, Any], columns: Iterable[str], index: int, source: str) -> None:
    """JSON can spell halves of a character (lone surrogates), which no tokenizer, file or server takes."""
    for column in columns:
        try:
            json.dumps({column: row.get(column)}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise InputError(
                f"{source}, row {index}: the column {column!r} holds {half!r}, half of a character; "
                "expected whole Unicode text."
            ) from None


def _text(row: Mapping[str, Any], column: str, index: int, source: str) -> str:
    value = _field(row, column, index, source)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{source}, row {index}: the column {column!r} is {value!r}, expected a text.")
    return value


def _pair(row: Mapping[str, Any], first: bool, where: Mapping[str, str], index: int, source: str) -> PairItem:
    texts = {f: _text(row, where[f], index, source) for f in ("instruction", "output_1", "output_2")}
    value = row.get(where["reference"]) if "reference" in where else None
    references = tuple(r for r in (value if isinstance(value, list) else [value]) if isinstance(r, str) and r.strip())
    return PairItem(**texts, label=1 if first else 2, references=references, cluster=texts["instruction"])


def _point(row: Mapping[str, Any], right: bool, where: Mapping[str, str], index: int, source: str) -> PointItem:
    prompt, answer = (_text(row, where[f], index, source) for f in ("prompt", "answer"))
    # The label is gold: no question may see it.
    columns = {k: v for k, v in row.items() if k != where["label"]}
    if "reference" in where:
        columns["reference"] = row.get(where["reference"])
    return PointItem(prompt, answer, right, columns, cluster=prompt)


def _spelling(
    values: Sequence[Any], given: Sequence[Any] | None, pairwise: bool, source: str, column: str
) -> tuple[Any, Any]:
    """The (first or right, second or wrong) spelling that all values keep to."""
    seen = {(type(value), value) for value in values}
    shown = ", ".join(sorted(repr(value) for _, value in seen)[:8])
    if given is not None:
        if len(given) != 2 or not all(isinstance(one, str | int | float) for one in given):
            raise InputError(f"labels {list(given)!r}: expected two spellings, the first (or right) one first.")
        # From the command line labels come as text, whatever their type in the file.
        typed = [next((v for _, v in seen if str(v) == str(one)), one) for one in given]
        tables: tuple[tuple[Any, Any], ...] = ((typed[0], typed[1]),)
    else:
        tables = _PAIR_SPELLINGS if pairwise else _POINT_SPELLINGS
    for table in tables:
        if seen <= {(type(value), value) for value in table}:
            return table
    matched = [t for t in tables if any(key in {(type(v), v) for v in t} for key in seen)]
    if len(matched) > 1:
        raise InputError(
            f"{source}: the column {column!r} mixes label spellings ({shown}); expected one way of writing."
        )
    kind = "output 1 or 2" if pairwise else "right or wrong"
    raise InputError(
        f"{source}: the column {column!r} holds {shown}, which does not say {kind}; give --labels FIRST,SECOND."
    )


def _flat_mtbench(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    """Rows of the published human judgements hold whole conversations; compare the last answers after the
    same turns.
    """
    if "conversation_a" not in row:
        return row
    value = row.get("turn")
    try:
        turn = 1 if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        turn = 0
    if turn < 1:
        raise InputError(f"{source}, row {index}: the column 'turn' is {value!r}, expected a whole number from 1.")
    first, second = (_turns(row, f"conversation_{side}", turn, index, source) for side in "ab")
    flat = {
        "instruction": "\n\n".join(message["content"] for message in first if message["role"] == "user"),
        "output_1": first[-1]["content"],
        "output_2": second[-1]["content"],
        "winner": row.get("winner"),
    }
    return flat | ({"reference": row["reference"]} if row.get("reference") else {})


def _turns(row: Mapping[str, Any], column: str, turn: int, index: int, source: str) -> list[dict[str, str]]:
    """The conversation's messages up to the answer of this turn."""
    value = row.get(column)
    messages = value[: 2 * turn] if isinstance(value, list) else []
    good = all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    if not good or len(messages) < 2 * turn:
        raise InputError(
            f"{source}, row {index}: the column {column!r} is no conversation up to turn {turn}, expected at least "
            f"{2 * turn} messages with a role and a content."
        )
    return messages

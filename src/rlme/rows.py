"""Rows from a JSONL, JSON, CSV or Parquet file, or from a dataset of the hub."""

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlme.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Rows:
    """Rows as read: every record has every column, None where the source had nothing.

    Attributes:
        source: the file or dataset, for messages.
        columns: in the order of first appearance.
        records: one dict per row.
        numbers: where each record stands: the line of a JSONL file, else the row, counted from 1.
    """

    source: str
    columns: list[str]
    records: list[dict[str, Any]]
    numbers: list[int]


def load_rows(source: str | Path, *, split: str = "train", name: str | None = None, limit: int | None = None) -> Rows:
    """The rows of a .jsonl, .json, .csv or .parquet file, or of a dataset that `datasets` can load.

    Args:
        source: a file, or a hub id or folder for `datasets.load_dataset`.
        split: of a dataset; a file has none.
        name: configuration of a dataset.
        limit: read only the first so many rows.

    Raises:
        InputError: no such file or dataset; a malformed line (with its number); no rows.
    """
    source = str(source)
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise InputError(f"data file {source!r} does not exist.")
        reader: Callable[[Path, int | None], list[tuple[int, Any]]] = {
            ".jsonl": _read_jsonl,
            ".json": _read_json,
            ".csv": _read_csv,
            ".parquet": _read_parquet,
        }[path.suffix]
        numbered = reader(path, limit)
    elif path.is_file():
        raise InputError(f"data file {source!r} is none of {', '.join(SUFFIXES)}.")
    else:
        numbered = _read_dataset(str(path) if path.is_dir() else source, split, name, limit)
    if not numbered:
        raise InputError(f"data {source!r} has no rows.")
    columns = list(dict.fromkeys(column for _, record in numbered for column in record))
    return Rows(
        source=source,
        columns=columns,
        records=[{column: record.get(column) for column in columns} for _, record in numbered],
        numbers=[number for number, _ in numbered],
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}).") from None


def _read_jsonl(path: Path, limit: int | None) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: {_bad_json(error)}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists thousands deep
            raise InputError(f"{path}, line {number}: it cannot be read ({error}).") from None
        rows.append((number, _object(record, f"{path}, line {number}")))
    return rows


def _read_json(path: Path, limit: int | None) -> list[tuple[int, Any]]:
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {_bad_json(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: it cannot be read ({error}).") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of objects, found {type(records).__name__}.")
    return [(n, _object(record, f"{path}, row {n}")) for n, record in enumerate(records[:limit], start=1)]


def _bad_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg}, column {error.colno})."


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: it holds half of a surrogate pair, which is no text.") from None
    return record


def _read_csv(path: Path, limit: int | None) -> list[tuple[int, Any]]:
    """Every cell stays text: a template shall see 3.50 and 007 as the file has them."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, which has 32 bits on Windows
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[tuple[int, Any]] = []
    try:
        for record in reader:
            if limit is not None and len(rows) == limit:
                break
            if None in record:
                raise InputError(
                    f"{path}, line {reader.line_num}: more cells than the header has columns "
                    f"({len(reader.fieldnames or [])})."
                )
            rows.append((len(rows) + 1, record))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None
    return rows


def _read_parquet(path: Path, limit: int | None) -> list[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({error}).") from None
    return list(enumerate(table.slice(0, limit).to_pylist(), start=1))


def _read_dataset(source: str, split: str, name: str | None, limit: int | None) -> list[tuple[int, Any]]:
    from datasets import Dataset, load_dataset

    try:
        dataset = load_dataset(source, name, split=split)
    except Exception as error:  # whatever the hub client, the network or a loader raises: no data
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"data {source!r} is neither a file ({', '.join(SUFFIXES)}) nor a dataset whose split {split!r} "
            f"could be loaded ({type(error).__name__}: {reason})."
        ) from None
    if not isinstance(dataset, Dataset):
        raise InputError(f"data {source!r}: split {split!r} is not one table of rows.")
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return list(enumerate(dataset.to_list(), start=1))

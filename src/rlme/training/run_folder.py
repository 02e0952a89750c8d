"""The run's folder on disk: written as the run goes, cut back to a checkpoint when it resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rlme.errors import InputError
from rlme.folders import locked, make_folder, replace_file, sync

FORMAT = 1
COMPLETE = "COMPLETE"  # written last into a checkpoint; one without it was cut off and does not count

_JUDGEMENT = pa.struct(
    [
        ("evaluator", pa.string()),
        ("question", pa.string()),
        ("score", pa.float64()),
        ("probability", pa.float64()),
        ("mass", pa.float64()),
        ("bounded", pa.bool_()),
        ("failure", pa.string()),
        ("detail", pa.string()),
        ("critique", pa.string()),
        ("weight", pa.float64()),
        ("tokens_in", pa.int64()),
        ("tokens_cached", pa.int64()),
        ("tokens_out", pa.int64()),
        ("cost", pa.float64()),
    ]
)
ROLLOUTS = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_index", pa.int32()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("correct", pa.bool_()),
        ("anchored", pa.bool_()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("judgements", pa.list_(_JUDGEMENT)),
    ]
)
"""One row a completion. `weight` is v_j * w_k of RLME eq. 3; 0 marks a held-out judgement."""


class RunFolder:
    """Paths and writers of one run. Metrics are whole lines, rollouts whole files, or they are not there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.eval = self.path / "eval"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new folder; one that exists and is not empty is an error, so that no run is ever overwritten."""
        folder = cls(path)
        folder.check_new()
        make_folder(folder.path, folder.rollouts, folder.eval, folder.checkpoints)
        return folder

    def check_new(self) -> None:
        """Raise `InputError` if there is something already."""
        if self.config.is_file() or self.metrics.is_file():
            raise InputError(
                f"{self.path} exists already: choose another `output` (or --output), or go on with it: "
                f"rlme train --resume {self.path}"
            )
        if self.path.exists() and (not self.path.is_dir() or any(map(_counts, self.path.rglob("*")))):
            raise InputError(f"{self.path} exists already, and is no run: choose another `output` (or --output)")
        above = next(path for path in self.path.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(f"output is {str(self.path)!r}, but {above} is no folder that can be written to")

    def locked(self) -> AbstractContextManager[None]:
        """Keep a second training out; `InputError` where there is one."""
        return locked(self.path, "another process is training in it")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run."""
        folder = cls(path)
        if not folder.config.is_file():
            raise InputError(f"{folder.path} is not a run folder: it has no config.yaml")
        return folder

    def write_config(self, content: Mapping[str, Any]) -> None:
        """The resolved configuration with versions and seeds."""
        replace_file(self.config, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))

    def write_best(self, content: Mapping[str, Any]) -> None:
        """Which checkpoint is the best one, by what, in best.json."""
        replace_file(self.path / "best.json", json.dumps(dict(content), indent=2) + "\n")

    def write_spent(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """What each evaluator behind an endpoint has taken so far, in spent.json. A resume does not cut it back: what
        was spent on steps that are done again is spent."""
        replace_file(self.path / "spent.json", json.dumps(totals, indent=2) + "\n")

    def read_spent(self) -> dict[str, dict[str, float]]:
        """The content of spent.json; empty where there is none."""
        path = self.path / "spent.json"
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """One line; flushed, so that a kill loses at most the line being written."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def write_rows(self, rows: Sequence[Mapping[str, Any]], step: int, *, held_out: bool = False) -> None:
        """The completions sampled for `step` (or measured after it) as one Parquet file."""
        table = pa.Table.from_pylist([{**row, "step": step} for row in rows], schema=ROLLOUTS)
        path = (self.eval if held_out else self.rollouts) / f"step-{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)

    def finish_checkpoint(self, folder: Path, keep: int, protected: Collection[int] = ()) -> None:
        """Mark a checkpoint as whole, then drop old ones but the `protected` steps: at every moment at least one whole
        one is there."""
        for path in folder.rglob("*"):
            if path.is_file():
                sync(path)
        replace_file(folder / COMPLETE, "")
        sync(folder)
        for old in self._whole_checkpoints()[:-keep]:
            if _step_of(old) in protected:
                continue
            (old / COMPLETE).unlink()  # first, so that a kill in the middle of the deletion leaves no half one
            shutil.rmtree(old)

    def last_checkpoint(self) -> tuple[int, Path | None]:
        """(step, folder) of the last whole checkpoint, or (0, None)."""
        whole = self._whole_checkpoints()
        return (_step_of(whole[-1]), whole[-1]) if whole else (0, None)

    def rewind(self) -> tuple[int, Path | None]:
        """Cut the folder back to its last whole checkpoint: what came after it will be done again."""
        step, checkpoint = self.last_checkpoint()
        whole = self._whole_checkpoints()
        for path in self.checkpoints.glob("*checkpoint-*"):  # what else TRL writes there (its logs) stays
            if path not in whole:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for part in (self.rollouts, self.eval):
            part.mkdir(parents=True, exist_ok=True)
            for path in part.iterdir():
                # the measurement before the first step belongs to step 0 and is repeated with it
                stale = path.suffix == ".partial" or checkpoint is None or _step_of(path) > step
                if stale:
                    path.unlink()
        lines = [] if checkpoint is None else [line for line in self.read_lines() if line["step"] <= step]
        replace_file(self.metrics, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines))
        shutil.rmtree(self.final, ignore_errors=True)
        return step, checkpoint

    def read_lines(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl (a line cut off by a kill is left out)."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def _whole_checkpoints(self) -> list[Path]:
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / COMPLETE).is_file()]
        return sorted(found, key=_step_of)


def _counts(path: Path) -> bool:
    """A run that was killed before it began leaves folders and a lock: that is nothing."""
    return not path.is_dir() and path.name != ".lock"


def _step_of(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1

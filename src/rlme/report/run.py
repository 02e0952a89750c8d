"""Reading a run's folder as it is: whole, still growing, cut off in the middle, or partly missing."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlme.errors import InputError
from rlme.training.run_folder import FORMAT, RunFolder

Record = dict[str, Any]

READ = ("config.yaml", "metrics.jsonl")
"""Files of a run that no report may overwrite."""
HUGE = 1e100
"""A number beyond it is a fault, and would overflow in sums and squares over the run."""


@dataclass
class Run:
    """A run as far as it can be read. `missing` says in sentences what could not be."""

    folder: Path
    config: dict[str, Any]
    info: dict[str, Any]
    records: list[Record]
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @cached_property
    def training(self) -> list[Record]:
        """The lines of training steps: step 0 holds only what was measured before training."""
        return [record for record in self.records if record["step"] > 0]

    @property
    def steps(self) -> int:
        """Training steps taken so far."""
        return self.training[-1]["step"] if self.training else 0

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """(step, sentence) of each alarm."""
        return [(record["step"], record["alarm"]) for record in self.records if record.get("alarm")]

    @cached_property
    def keys(self) -> list[str]:
        """Every metric that occurs, in the order of first appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) where the metric was measured."""
        points = [(r["step"], float(r[key])) for r in self.records if _is_number(r.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def total(self, key: str) -> float | None:
        """Sum over the steps; None when the metric never occurs."""
        values = self.series(key)[1]
        return math.fsum(values) if values else None

    def section(self, name: str) -> dict[str, Any]:
        """A mapping of the configuration; empty when it is missing or something else."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def weight(self, evaluator: str, question: str) -> float | None:
        """v_j * w_k as configured; None when the configuration does not tell."""
        evaluators = self.config.get("evaluators") or []
        try:
            w = float(self.section("questions")[question].get("weight", 1.0))
            v = next(e for e in evaluators if _label(e) == evaluator).get("weight")
        except (KeyError, AttributeError, StopIteration, TypeError, ValueError):
            return None
        return w * (1.0 if v is None else float(v))  # evaluators without a weight share 1: never 0

    def watched(self, evaluator: str, question: str) -> bool:
        """Whether a best checkpoint may be chosen by this judgement: it is in no reward, and more of it is better (0
        times a negative weight is -0.0)."""
        weight = self.weight(evaluator, question)
        return weight is not None and weight == 0 and math.copysign(1.0, weight) > 0

    def rollout_files(self, *, held_out: bool = False) -> dict[int, Path]:
        """step -> Parquet file, in order."""
        paths = sorted((self.folder / ("eval" if held_out else "rollouts")).glob("step-*.parquet"))
        return {int(path.stem.split("-")[1]): path for path in paths if path.stem.split("-")[1].isdigit()}

    @cached_property
    def completions(self) -> int:
        """Completions in the rollouts, from the Parquet files' footers; a broken file counts nothing."""
        import pyarrow.parquet as pq

        count = 0
        for path in self.rollout_files().values():
            with contextlib.suppress(OSError, ValueError):  # said where the samples are read
                count += pq.read_metadata(path).num_rows
        return count


def _label(evaluator: Mapping[str, Any]) -> str:
    endpoint = evaluator.get("endpoint") or {}
    source = str(evaluator.get("model") or endpoint.get("model") or "evaluator")
    return str(evaluator.get("name") or source.rstrip("/").removesuffix(".gguf").split("/")[-1].split(":")[-1])


def read_run(path: Path) -> Run:
    """Read a run's folder. Whatever is missing or broken in it is said in `missing`, not raised.

    Raises InputError when `path` is no folder, or one with other things in it and nothing of a run.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: expected a run's folder, such as runs/NAME")
    folder = RunFolder(path)
    parts = (folder.config, folder.metrics, folder.rollouts, folder.eval)
    others = {part.name for part in path.iterdir()} - {"report.html"}
    if others and not any(part.exists() for part in parts):
        raise InputError(f"{path} is not a run's folder: it has no config.yaml, no metrics.jsonl and no rollouts/")
    missing: list[str] = []
    config = _read_config(folder.config, missing)
    info = config.pop("run_info", None) or {}
    if not isinstance(info, dict):
        info = {}
    version = info.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        missing.append(
            f"The folder has format {version}, this version of rlme knows {FORMAT}: what is new in it is not shown."
        )
    records = list(_read_metrics(folder.metrics, missing))
    run = Run(path, config, info, records, missing)
    if not run.training:
        missing.append(
            "The run has zero steps: only the starting model was measured."
            if run.section("train").get("steps") == 0
            else "No training step has been recorded yet: there is nothing to judge."
        )
    elif not run.rollout_files():
        missing.append("There are no rollouts/: the samples cannot be shown.")
    return run


def _read_config(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append("There is no config.yaml: settings, versions and weights are unknown.")
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        missing.append(f"config.yaml cannot be read: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(config, dict):
        missing.append("config.yaml holds no settings.")
        return {}
    return config


def _read_metrics(path: Path, missing: list[str]) -> Iterator[Record]:
    """Whole lines with a step, the last of each step (a resumed run may repeat one), in the order of steps."""
    if not path.is_file():
        missing.append("There is no metrics.jsonl.")
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    by_step: dict[int, Record] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            where = "The last line" if number >= len(lines) - 1 else f"Line {number}"
            missing.append(f"{where} of metrics.jsonl is cut off or not a record, and was left out.")
            continue
        if not _is_number(step) or not isinstance(step, int):
            missing.append(f"Line {number} of metrics.jsonl has no whole number as step, and was left out.")
            continue
        usable = {k: v for k, v in record.items() if (isinstance(v, str) if k == "alarm" else _is_number(v))}
        by_step[step] = by_step.get(step, {}) | usable
    yield from (by_step[step] for step in sorted(by_step))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -HUGE < value < HUGE  # NaN is neither

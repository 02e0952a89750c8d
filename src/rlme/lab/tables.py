"""The reading experiment's table: accuracy by domain before and after training."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq

from rlme.lab.results import ArmRuns, shown
from rlme.training.run_folder import RunFolder


def domain_accuracies(data: Path, run: Path) -> list[dict[str, float]]:
    """Accuracy by domain at every held-out measurement of a run, in order."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    domains = {row["problem"]: row["domain"] for row in rows}
    measured = []
    for file in sorted(RunFolder(run).eval.glob("step-*.parquet")):
        right: dict[str, list[bool]] = defaultdict(list)
        for row in pq.read_table(file, columns=["prompt", "correct"]).to_pylist():
            problem = row["prompt"].split("\n")[1]
            right[domains[problem]].append(row["correct"])
        measured.append({domain: fmean(values) for domain, values in right.items()})
    return measured


def reading_table(data: Path, runs: list[ArmRuns]) -> str:
    """Domains as columns, arms as rows; the first row is the model before training."""
    by_arm = {r.arm.label: [domain_accuracies(data, f) for f in r.folders.values()] for r in runs}
    domains = list(next(iter(by_arm.values()))[0][0])
    families = [d for d in domains if d != "against"]
    head = [*families, "mean", "against what was taught"]
    lines = ["| arm | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    some = next(iter(by_arm.values()))
    for label, measured in (("before", [m[:1] for m in some]), *by_arm.items()):
        ends = [m[-1] for m in measured]
        cells = [shown([e[d] for e in ends]) for d in families]
        cells.append(shown([fmean(e[d] for d in families) for e in ends]))
        cells.append(shown([e["against"] for e in ends]))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

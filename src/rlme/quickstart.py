"""The quickstart's ending: held-out answers before and after training, and how many of them really are lists."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlme.training.display import plain
from rlme.training.run_folder import RunFolder

_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


def has_list(text: str) -> bool:
    """Whether a text has a list: a line that starts as an item does (`- `, `* `, `1. `). No reward sees this rule."""
    return _ITEM.search(text) is not None


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def measured(run: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """(step, rows) of every held-out measurement of a run, in order."""
    files = sorted(RunFolder(run).eval.glob("step-*.parquet"))
    return [(int(f.stem.split("-")[1]), pq.read_table(f).to_pylist()) for f in files]


def before_after_answers(run: Path, console: Console, table: Path | None, shown: int = 4) -> None:
    """Print the first and last held-out measurement of a run side by side; `table` gets the numbers as JSON."""
    measurements = measured(run)
    (first, before), (last, after) = measurements[0], measurements[-1]
    sides = Table(title="held-out answers", title_justify="left", show_lines=True, expand=True)
    sides.add_column("prompt", ratio=2)
    sides.add_column(f"before (step {first})", ratio=4)
    sides.add_column(f"after (step {last})", ratio=4)
    for b, a in list(zip(before, after, strict=True))[:shown]:
        question = b["prompt"].rsplit("user\n", 1)[-1].split("<|im_end|>")[0]
        sides.add_row(
            Text(plain(question, 120)), *(Text(f"{plain(r['completion'], 300)}\n\n{_verdicts(r)}") for r in (b, a))
        )
    console.print(sides)
    rows = []
    for name, value in (("has a list (counted by rule, never in the reward)", has_list),):
        counts = [sum(value(r["completion"]) for r in part) for part in (before, after)]
        low_high = [wilson(c, len(p)) for c, p in zip(counts, (before, after), strict=True)]
        rows.append(
            {
                "what": name,
                "before": counts[0] / len(before),
                "before_95": low_high[0],
                "after": counts[1] / len(after),
                "after_95": low_high[1],
            }
        )
    for evaluator, question in sorted({(j["evaluator"], j["question"]) for r in before for j in r["judgements"]}):
        means = [_mean_probability(part, evaluator, question) for part in (before, after)]
        rows.append({"what": f"P(yes) {question} ({evaluator})", "before": means[0], "after": means[1]})
    lengths = [sum(len(r["completion"]) for r in part) / len(part) for part in (before, after)]
    rows.append({"what": "characters", "before": lengths[0], "after": lengths[1]})
    numbers = Table(title=f"{len(before)} held-out prompts", title_justify="left")
    for column in ("", "before", "after"):
        numbers.add_column(column)
    for row in rows:
        numbers.add_row(str(row["what"]), *(_cell(row, side) for side in ("before", "after")))
    console.print(numbers)
    if table is not None:
        table.write_text(json.dumps({"run": str(run), "rows": rows}, indent=2), encoding="utf-8")


def _cell(row: dict[str, Any], side: str) -> str:
    value = row[side]
    if value is None:
        return "-"
    text = f"{value:.0f}" if value > 5 else f"{value:.2f}"
    interval = row.get(f"{side}_95")
    return text + (f"  ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def _verdicts(row: dict[str, Any]) -> str:
    return "  ".join(
        f"[{j['question']} {'-' if j['failure'] else format(j['probability'], '.2f')}]" for j in row["judgements"]
    )


def _mean_probability(rows: list[dict[str, Any]], evaluator: str, question: str) -> float | None:
    values = [
        j["probability"]
        for r in rows
        for j in r["judgements"]
        if (j["evaluator"], j["question"]) == (evaluator, question) and j["failure"] is None
    ]
    return sum(values) / len(values) if values else None

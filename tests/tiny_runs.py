"""Small complete runs for tests: a prompts file, a configuration, and the naive mathematics to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

PROMPTS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}", "topic": "sums"}
    for a, b in [(1, 2), (3, 4), (2, 5), (6, 1), (4, 4), (9, 3)]
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few steps; `changes` replaces whole sections or (for dicts) updates them."""
    data = write_jsonl(folder / "prompts.jsonl", PROMPTS)
    config: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(data), "prompt": "{{ question }}", "answer": "answer"},
        "questions": {"correct": "Is the answer correct?", "brief": {"ask": "Is it short?", "weight": 0.5}},
        "evaluators": ["live"],
        "judging": {"template": "reply", "readout": "yes_no"},
        "train": {
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 3,
            "max_completion_tokens": 6,
            "learning_rate": 1e-3,
            "show_every": 0,
            "precision": "float32",
        },
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict) and key != "questions":
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    return config


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, model, **changes), sort_keys=False))
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_rollouts(run: Path, part: str = "rollouts") -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for file in sorted((run / part).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def is_timing(key: str) -> bool:
    return key.startswith(("time/", "tokens_per_second/", "memory/"))

"""Several processes, each with its own prompts: their passes need not be alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import read_metrics, write_config, write_jsonl


def test_processes_whose_batches_split_differently(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """A long prompt's group takes several passes in one process, a short one's a single pass in the other."""
    words = "the answer is not what she said it was "
    rows = [{"question": words * (12 if i % 2 else 1), "answer": "1"} for i in range(6)]
    runs = []
    for budget in (64, 8192):
        folder = tmp_path / str(budget)
        folder.mkdir()
        data = {"train": str(write_jsonl(folder / "rows.jsonl", rows))}
        changes = {"token_budget": budget, "learning_rate": 1e-5, "group_size": 4, "max_completion_tokens": 12}
        config = write_config(folder, tiny_policy_dir, data=data, train={**changes, "stop": ["e"]})
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rlme"]
        done = subprocess.run(
            [sys.executable, *launch, "train", str(config)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(read_metrics(folder / "run"))
    assert len(runs[0]) == len(runs[1]) == 2
    for split, whole in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "reward"):
            assert split[key] == pytest.approx(whole[key], abs=1e-4), key
        assert split["entropy"] == pytest.approx(whole["entropy"], rel=0.02)  # of a mean of means: unequal weights
        assert split["clip_ratio"] == pytest.approx(whole["clip_ratio"], abs=0.1)

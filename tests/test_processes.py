"""Several processes, each with its own prompts: their passes need not be alike, and one of them may stop alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.born import Rlme
from tests.tiny_runs import PROMPTS, is_timing, read_metrics, read_rollouts, write_config, write_jsonl

STOPS = """
import os, sys
from rlme.cli import main
from rlme.errors import RunStopped
from rlme.evaluators.local import LocalEvaluator

plain, calls = LocalEvaluator.logprobs, []

def logprobs(*arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 5:
        raise RunStopped("the evaluator is gone")
    return plain(*arguments, **options)

LocalEvaluator.logprobs = logprobs
main(sys.argv[1:])
"""


def both(*arguments: str) -> None:
    """`rlme ARGUMENTS` in two processes, as a launcher starts them; a long wait of one for the other is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = [Rlme(*arguments, environment={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for one in two:
        assert one.wait(120) == 0, one.errors.read_text()[-3000:]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same by PyTorch's launcher, with what it says of how they ended."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [sys.executable, *torchrun, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


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
        both("train", str(config))
        runs.append(read_metrics(folder / "run"))
    assert len(runs[0]) == len(runs[1]) == 2
    for split, whole in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "reward"):
            assert split[key] == pytest.approx(whole[key], abs=1e-4), key
        assert split["entropy"] == pytest.approx(whole["entropy"], rel=0.02)  # of a mean of means: unequal weights
        assert split["clip_ratio"] == pytest.approx(whole["clip_ratio"], abs=0.1)


def test_what_stops_one_process_stops_all_and_the_run_goes_on_exactly(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """With held-out prompts that two processes cannot share evenly, and rewards normalised over both."""
    changes = {
        "reward": {"mode": "rlvr+rlme", "combine": "normalized"},
        "train": {"steps": 4, "group_size": 2, "checkpoint_every": 1, "eval_every": 2},
    }
    runs = []
    for name in ("plain", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        data = {"eval": str(write_jsonl(folder / "held-out.jsonl", PROMPTS[:3]))}
        config = str(write_config(folder, tiny_policy_dir, data=data, **changes))
        runs.append(folder / "run")
        if name == "plain":
            both("train", config)
        else:
            (folder / "stops.py").write_text(STOPS)
            stopped = launch(str(folder / "stops.py"), "train", config)
            assert "stopped: the evaluator is gone. The state is saved: rlme train --resume" in stopped.stderr
            assert "exitcode  : 3" in stopped.stderr
            assert 0 < len(read_metrics(folder / "run")) < 5
            both("train", "--resume", str(folder / "run"))
    plain, resumed = ([{k: v for k, v in m.items() if not is_timing(k)} for m in read_metrics(run)] for run in runs)
    assert [line["step"] for line in plain] == [0, 1, 2, 3, 4]
    assert resumed == plain
    for run in runs:
        assert [row["prompt_index"] for row in read_rollouts(run, "eval")] == [0, 1, 2] * 3

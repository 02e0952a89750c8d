"""A run killed at any moment and resumed equals one that was never interrupted, bit for bit in float32 on a CPU."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.born import Rlme
from tests.tiny_runs import is_timing, read_metrics, read_rollouts, write_config

STEPS = 7


def record(run: Path) -> dict[str, Any]:
    """All of a run that must not depend on interruptions."""
    metrics = [{k: v for k, v in line.items() if not is_timing(k)} for line in read_metrics(run)]
    weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / "final").glob("*.safetensors")}
    return {
        "metrics": metrics,
        "rollouts": read_rollouts(run),
        "eval": read_rollouts(run, "eval"),
        "weights": weights,
    }


def setting(tmp_path: Path, model: Path, name: str, **changes: Any) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    held_out = folder / "held.jsonl"
    held_out.write_text('{"question": "What is 5 plus 5?", "answer": "#### 10"}\n')
    return write_config(
        folder,
        model,
        data={"eval": str(held_out)},
        evaluators=["live", "frozen"],
        reward={"mode": "rlvr+rlme", "anchor": 0.5},
        train={
            "steps": STEPS,
            "checkpoint_every": 2,
            "keep_checkpoints": 1,
            "eval_every": 3,
            "seed": 5,
            **changes.pop("train", {}),
        },
        **changes,
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": {"updates_per_batch": 3, "checkpoint_every": 1}}, {"lora": {"r": 4, "dropout": 0.1}}],
    ids=["full", "several-updates-per-batch", "lora-with-dropout"],
)
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    tiny_policy_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train = dict(changes.get("train", {}))
    rest = {k: v for k, v in changes.items() if k != "train"}
    whole = setting(tmp_path, tiny_policy_dir, "whole", train=train, **rest)
    Rlme("train", str(whole)).finish()
    expected = record(whole.parent / "run")
    assert [m["step"] for m in expected["metrics"]] == list(range(STEPS + 1))

    cut = setting(tmp_path, tiny_policy_dir, "cut", train=train, **rest)
    run = cut.parent / "run"
    dice = random.Random(1)
    kills = 0
    process = Rlme("train", str(cut))
    while kills < 3:
        wanted = 1 + kills * 2  # some progress each time, then a random moment in the step (or checkpoint) after it
        deadline = time.monotonic() + 240
        while process.running() and time.monotonic() < deadline:
            lines = run / "metrics.jsonl"
            if lines.is_file() and lines.read_text().count("\n") > wanted:
                break
            time.sleep(0.005)
        time.sleep(dice.random() * 0.25)
        if not process.running():
            break  # it was faster than the dice
        process.send(signal.SIGKILL)
        process.wait()
        kills += 1
        process = Rlme("train", "--resume", str(run))
    process.finish()
    assert kills, "the run was never interrupted"
    got = record(run)
    assert json.dumps(got["metrics"]) == json.dumps(expected["metrics"])
    assert got["rollouts"] == expected["rollouts"]
    assert got["eval"] == expected["eval"]
    assert got["weights"] == expected["weights"]


def test_a_checkpoint_cut_off_while_being_written_does_not_count(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from rlme.training.run_folder import RunFolder

    folder = RunFolder.create(tmp_path / "run")
    folder.write_config({})
    for step in (2, 4):
        path = folder.checkpoints / f"checkpoint-{step}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"weights")
        if step == 2:
            folder.finish_checkpoint(path, keep=1)
    for step in range(1, 5):
        folder.append_metrics({"step": step})
        folder.write_rows([], step)
    with open(folder.metrics, "a") as file:
        file.write('{"step": 5, "rew')
    assert folder.rewind() == (2, folder.checkpoints / "checkpoint-2")
    assert [line["step"] for line in folder.read_lines()] == [1, 2]
    assert sorted(p.name for p in folder.rollouts.iterdir()) == ["step-000001.parquet", "step-000002.parquet"]
    assert [p.name for p in folder.checkpoints.iterdir()] == ["checkpoint-2"]


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = setting(
        tmp_path, tiny_policy_dir, "interrupted", train={"steps": 500, "checkpoint_every": 400, "eval_every": 400}
    )
    run = config.parent / "run"
    process = Rlme("train", str(config))
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.running()
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert process.wait() == 3, process.errors.read_text()
    assert f"rlme train --resume {run}" in process.errors.read_text()
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*/COMPLETE")
    step = int(checkpoint.parent.name.split("-")[1])
    assert read_metrics(run)[-1]["step"] == step
    Rlme("train", "--resume", str(run), "--set", f"train.steps={step + 2}").finish()
    assert [m["step"] for m in read_metrics(run)] == list(range(step + 3))

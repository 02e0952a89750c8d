"""The alarm in a whole run: it warns, keeps the checkpoint from before the fall, and with `on_alarm: stop` ends it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlme.cli import main
from rlme.training.recorder import Recorder
from tests.tiny_runs import read_metrics, write_config, write_jsonl

FALL = 7


def collapse(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """A run of 10 steps whose reward rises while its held-out accuracy falls at step 7; returns the exit code."""
    held = write_jsonl(folder / "held.jsonl", [{"question": f"Held out {i}?", "answer": "#### 1"} for i in range(200)])

    def measure(self: Recorder, step: int) -> dict[str, Any]:
        return {"eval/gold/accuracy": 0.1 if step >= FALL else 0.9 + (step == 5) * 0.01}

    monkeypatch.setattr(Recorder, "measure", measure)
    step = iter(range(100))
    monkeypatch.setattr("rlme.training.recorder.batch_monitors", lambda rows: {"reward": float(next(step))})
    config = write_config(
        folder,
        model,
        data={"eval": str(held)},
        train={"steps": 10, "eval_every": 1, "checkpoint_every": 100, "keep_checkpoints": 1},
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), *arguments])
    return int(ended.value.code or 0)


def checkpoints(run: Path) -> set[int]:
    return {int(path.parent.name.split("-")[1]) for path in (run / "checkpoints").glob("*/COMPLETE")}


def test_it_warns_and_the_checkpoint_from_before_and_the_best_one_stay(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collapse(tmp_path, tiny_policy_dir, monkeypatch) == 0
    metrics = {m["step"]: m for m in read_metrics(tmp_path / "run")}
    assert [step for step, m in metrics.items() if "alarm" in m] == [FALL]
    assert "gold accuracy fell from 0.902" in metrics[FALL]["alarm"]
    assert "Prefer the checkpoint of step 6." in metrics[FALL]["alarm"]
    assert f"alarm at step {FALL}" in capsys.readouterr().out
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["metric"]) == (5, "eval/gold/accuracy")  # the reward is highest at step 10
    assert {5, 6, 10} <= checkpoints(tmp_path / "run")
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_stop_ends_the_run_there_and_it_can_go_on(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = collapse(tmp_path, tiny_policy_dir, monkeypatch, "--set", "train.on_alarm=stop")
    said = " ".join(capsys.readouterr().err.split())
    assert code != 0 and "stopped by the alarm after step 7" in said and "train.on_alarm=warn" in said
    assert read_metrics(tmp_path / "run")[-1]["step"] == FALL
    assert {6, FALL} <= checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(tmp_path / "run"), "--set", "train.on_alarm=warn"])
    assert ended.value.code == 0
    assert [m["step"] for m in read_metrics(tmp_path / "run") if "alarm" in m] == [FALL]  # not a second time
    assert (tmp_path / "run" / "final").is_dir()

"""Batches and micro-batches of a run, what TRL's settings do to them, and a stop between two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlme import RLMETrainer, RunStopped, load_tokenizer
from rlme.commands import read_config, resume_run
from rlme.training.order import PromptOrder
from rlme.training.recorder import Recorder
from rlme.training.run import train as run_training
from tests.tiny_runs import PROMPTS, is_timing, read_metrics, read_rollouts, write_config, write_jsonl


def train(config: str) -> None:
    run_training(read_config(config), Console(quiet=True))


def test_groups_stay_together_in_micro_batches(tiny_policy_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The same update as in one batch, with no prompt computed in more than one of four micro-batches."""
    seen: list[set[tuple[int, ...]]] = []
    plain = RLMETrainer._packs

    def watched(self: Any, model: Any, inputs: Any) -> Any:
        seen.append({tuple(ids.tolist()) for ids in inputs["prompt_ids"]})
        return plain(self, model, inputs)

    monkeypatch.setattr(RLMETrainer, "_packs", watched)
    for name, steps in (("one", 1), ("four", 4)):
        (tmp_path / name).mkdir()
        data = {"train": str(write_jsonl(tmp_path / name / "rows.jsonl", PROMPTS)), "prompt": "{{ question }}"}
        changes = {"prompts_per_step": 4, "group_size": 2}
        train(str(write_config(
            tmp_path / name, tiny_policy_dir, data=data, train=changes, trl={"gradient_accumulation_steps": steps}
        )))  # fmt: skip
    whole, parts = seen[:2], seen[2:]
    assert [len(prompts) for prompts in whole] == [4, 4] and [len(prompts) for prompts in parts] == [1] * 8
    one, four = (read_metrics(tmp_path / name / "run")[0] for name in ("one", "four"))  # later seeds are of micro-steps
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert four["reward"] == pytest.approx(one["reward"], abs=1e-5)


def test_what_only_transformers_can_do_is_left_to_it(tiny_policy_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_policy_dir)
    (only,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    options = {"generation_kwargs": {"suppress_tokens": [i for i in range(len(tokenizer)) if i != only]}}
    train(str(write_config(tmp_path, tiny_policy_dir, trl=options, train={"steps": 1})))
    assert {row["completion"] for row in read_rollouts(tmp_path / "run")} == {"a" * 6}


def test_a_stop_while_measuring_leaves_nothing_out(tiny_policy_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The step's own line is written; what is missing is measured on resume, after the last step as well."""
    for last, steps in ((False, 3), (True, 2)):
        runs = []
        for name in ("plain", "stopped"):
            folder = tmp_path / f"{name}-{last}"
            folder.mkdir()
            data = {"eval": str(write_jsonl(folder / "held-out.jsonl", PROMPTS[:2]))}
            config = write_config(
                folder, tiny_policy_dir, data=data, train={"steps": steps, "eval_every": 2, "checkpoint_every": 1}
            )
            runs.append(folder / "run")
            if name == "stopped":
                plain = Recorder.measure

                def gone(self: Any, step: int, plain: Any = plain) -> Any:
                    if step == 2:
                        raise RunStopped("the endpoint is gone")
                    return plain(self, step)

                monkeypatch.setattr(Recorder, "measure", gone)
                with pytest.raises(RunStopped, match="endpoint is gone"):
                    train(str(config))
                assert [line["step"] for line in read_metrics(runs[-1])] == [0, 1, 2]
                monkeypatch.setattr(Recorder, "measure", plain)
                resume_run(runs[-1], [], None)
            else:
                train(str(config))
        lines = []
        for run in runs:
            merged: dict[int, dict[str, Any]] = {}
            for line in read_metrics(run):
                merged.setdefault(line["step"], {}).update({k: v for k, v in line.items() if not is_timing(k)})
            lines.append(merged)
        assert lines[0] == lines[1] and "eval/reward" in lines[0][2]


def test_no_prompt_twice_in_a_batch() -> None:
    order = PromptOrder(prompts=7, prompts_per_batch=4, group_size=2, repeats=1, batches=50, seed=1)
    indices = list(order)[::2]
    batches = [indices[i : i + 4] for i in range(0, len(indices), 4)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert {indices.count(i) for i in range(7)} <= {28, 29}
    few = list(PromptOrder(prompts=2, prompts_per_batch=4, group_size=1, repeats=1, batches=3, seed=1))
    assert [few.count(i) for i in range(2)] == [6, 6]

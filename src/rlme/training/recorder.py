"""From TRL's logs to a run's record: one metrics line a step, rollouts, held-out measurements, the display."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from rlme.data import PromptSet
from rlme.errors import RunStopped
from rlme.processes import dealt, everywhere
from rlme.reward import Row, judgement_metrics
from rlme.training.costs import Costs
from rlme.training.drift import Drift
from rlme.training.monitors import Alarm, batch_monitors, best_metric, best_step, judged_part, judged_reward, replay
from rlme.training.run_folder import RunFolder
from rlme.training.trainer import RLMETrainer

# TRL's name -> ours; what is not here and has no slash of ours is not written.
_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "kl": "kl",
    "aux_loss": "aux_loss",
    "cispo_clip_ratio": "clip_ratio",
    "clip_ratio/region_mean": "clip_ratio",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_groups_flat",
    "completions/mean_length": "completions/mean_tokens",
}

Record = dict[str, Any]
MEASURED = "time/measure"  # in the line of every step at which the held-out prompts were measured


class Recorder(TrainerCallback):
    """Writes the run folder while the trainer works. Only the main process writes; all take part in measuring."""

    def __init__(
        self,
        trainer: RLMETrainer,
        folder: RunFolder,
        *,
        held_out: PromptSet | None,
        eval_every: int,
        on_alarm: str,
        load_seconds: float,
        costs: Costs,
        on_step: Callable[[Record, list[Row]], None],
    ) -> None:
        self.trainer, self.folder = trainer, folder
        self.held_out, self.eval_every, self.on_alarm = held_out, eval_every, on_alarm
        self.load_seconds = load_seconds
        self.costs = costs
        self.on_step = on_step
        self.alarm = Alarm(prompts=len(held_out) if held_out is not None else 1)
        self.drift = Drift(folder.eval / "start.jsonl")
        self.measured: dict[int, float] = {}
        """Step -> the held-out number that the best checkpoint is chosen by."""
        self.metric: str | None = None
        """Its name: one and the same for the whole run."""
        self.rows: list[Row] = []
        self.stopped_by: str | None = None
        self._used: dict[str, dict[str, float]] = {}
        self._step_started = time.perf_counter()
        self._started = self._step_started
        trainer.on_rollouts = self.on_rollouts

    def on_rollouts(self, step: int, rows: list[Row]) -> None:
        """A batch was judged: write it at once."""
        self.rows = rows
        if self.trainer.accelerator.is_main_process:
            self.folder.write_rows(rows, step)
        self.costs.save(self.costs.totals())  # paid now, whatever becomes of the step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the starting model, unless a resumed run already has."""
        lines = self.folder.read_lines()  # of a resumed run: alarm and best checkpoint follow from them
        replay(self.alarm, lines, self._held_out_names())
        for line in lines:
            self._note_best(line)
        if state.global_step > 0:
            self.drift.load(self.trainer)
        if state.global_step == 0 and self.held_out is not None:
            self._write({"step": 0, "time/load": self.load_seconds, **self.measure(0)}, [])
        elif self._due(state) and not any(line["step"] == state.global_step and MEASURED in line for line in lines):
            record = {"step": state.global_step, **self.measure(state.global_step)}  # what stopped the run last time
            self._judge_progress(record, control)
            self._write(record, [])
        self._step_started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Record | None = None, **kwargs: Any) -> None:
        """After each update."""
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        record: Record = {"step": step}
        record |= {ours: logs[theirs] for theirs, ours in _NAMES.items() if logs.get(theirs) is not None}
        if self.rows:
            record |= judgement_metrics(self.rows) | batch_monitors(self.rows) | self._judged_part(self.rows)
        record |= self._costs()
        if step == 1 and self.held_out is None:  # else step 0 has it
            record["time/load"] = self.load_seconds
        if self._due(state):
            try:
                record |= self.measure(step)
            except RunStopped:  # the step is done; what is missing is measured when the run goes on
                self._write(record, self.rows)
                raise
        self._judge_progress(record, control)
        self._write(record, self.rows)
        self.rows = []
        self._step_started = time.perf_counter()

    def _due(self, state: Any) -> bool:
        """Whether the held-out prompts are measured after this step."""
        step = state.global_step
        return self.held_out is not None and step > 0 and (step % self.eval_every == 0 or step == state.max_steps)

    def _judge_progress(self, record: Record, control: Any) -> None:
        """Best checkpoint and alarm, by what was measured at a step."""
        self._note_best(record)
        names = self._held_out_names()
        held_out = {name: record[f"eval/{name}"] for name in names if f"eval/{name}" in record}
        if alarm := self.alarm.update(record["step"], judged_reward(record), held_out):
            record["alarm"] = alarm
            if self.on_alarm == "stop":
                self.stopped_by = alarm
                control.should_save = control.should_training_stop = True
        if record["step"] in self.protected:
            control.should_save = True

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints stay: the best one, and those that an alarm could name as the last good one."""
        best = best_step(self.measured)
        return self.alarm.candidates | ({best} if best is not None else set())

    def _held_out_names(self) -> list[str]:
        """Numbers the policy is not trained on, of which more is better: gold, and judgements of weight 0 (but of a
        question with a negative weight, whose fall is no bad sign)."""
        reward = self.trainer.reward
        names = [(f"{e.name}/{q.name}", q) for e in reward.evaluators(self.trainer) for q in reward.questions]
        free = [
            f"judge/{name}/probability"
            for (name, question), weight in zip(names, reward.weights, strict=True)
            if weight == 0 and question.weight >= 0
        ]
        return ["gold/accuracy", *free]

    def _judged_part(self, rows: list[Row]) -> Record:
        return judged_part(rows) if getattr(self.trainer.reward, "mode", None) == "rlvr+rlme" else {}

    def _note_best(self, record: Record) -> None:
        values = {name: record[f"eval/{name}"] for name in self._held_out_names() if f"eval/{name}" in record}
        metric = self.metric = self.metric or best_metric(values)
        # Of the starting model there is no checkpoint; what failed at a measurement is not compared at it.
        if metric is None or metric not in values or record["step"] == 0:
            return
        self.measured[record["step"]] = values[metric]
        best = best_step(self.measured)
        if best == record["step"] and self.trainer.accelerator.is_main_process:
            self.folder.write_best(
                {
                    "step": best,
                    "metric": f"eval/{metric}",
                    "value": values[metric],
                    "checkpoint": f"checkpoints/checkpoint-{best}",
                }
            )

    def _write(self, record: Record, rows: list[Row]) -> None:
        record = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        if self.trainer.accelerator.is_main_process:
            self.folder.append_metrics(record)
            self.on_step(record, rows)

    def _costs(self) -> Record:
        """Seconds, tokens and memory of the step that has just ended."""
        now = time.perf_counter()
        step, timings = now - self._step_started, self.trainer.timings
        counts = Counter[str]()
        for mine in everywhere([self.trainer.counts], self.trainer.accelerator):
            counts.update(mine)
        record: Record = {f"time/{stage}": seconds for stage, seconds in timings.items()}
        record["time/other"] = max(0.0, step - sum(timings.values()))
        record["time/step"] = step
        record["time/elapsed"] = now - self._started
        record |= {f"tokens/{what}": n for what, n in counts.items()}
        for stage, what in (("sample", "sampled"), ("judge", "judged_in"), ("update", "trained")):
            if timings.get(stage):
                record[f"tokens_per_second/{stage}"] = counts.get(what, 0) / timings[stage]
        cost = sum(j["cost"] for row in self.rows for j in row["judgements"])
        if cost:
            record["cost/step"] = cost
        record |= self._endpoint_use()
        record["memory/peak_mb"] = peak_memory_mb()
        self.trainer.timings, self.trainer.counts = {}, {}
        return record

    def _endpoint_use(self) -> Record:
        """Calls, retries, tokens and cost of each evaluator behind an endpoint since the last line."""
        record: Record = {}
        totals = self.costs.totals()
        for name, account in totals.items():
            before = self._used.get(name, {})
            record |= {f"endpoint/{name}/{k}": v - before.get(k, 0.0) for k, v in account.items()}
        self._used = totals
        self.costs.save(totals)
        return record

    def measure(self, step: int) -> Record:
        """Sample and judge the held-out prompts once each; nothing of this reaches the reward or the random state of
        training. Returns eval/... metrics."""
        assert self.held_out is not None
        trainer = self.trainer
        started = time.perf_counter()
        timings, counts, metrics = trainer.timings, trainer.counts, trainer._metrics["eval"]
        trainer.timings, trainer.counts = {}, {}
        training = trainer.model.training
        trainer.model.eval()
        mine, own = dealt(self.held_out.prompts, trainer.accelerator)
        rows: list[Row] = []
        asked: list[list[int]] = []
        answered: list[list[int]] = []
        batch = trainer.args.per_device_train_batch_size
        state = torch.get_rng_state()
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            prompts = [p.prompt for p in part]
            columns: dict[str, Any] = {
                "gold": [p.gold for p in part],
                "columns": [json.dumps(p.columns, default=str) for p in part],
            }
            if trainer.reward.answer is None:
                del columns["gold"]
            trainer.upcoming = [
                {"prompt": prompt} | {name: values[i] for name, values in columns.items()}
                for i, prompt in enumerate(prompts)
            ]
            prompt_ids, ids, _, completions, *_ = trainer._generate(prompts)
            asked, answered = asked + prompt_ids, answered + ids
            trainer.upcoming = None
            trainer.reward.score(
                prompts, completions, ids, trainer=trainer, columns=columns, enforce_failure_rate=False
            )
            trainer.key_values = None
            for prompt, row, cut in zip(part, trainer.reward.rows, trainer._truncated, strict=True):
                rows.append(row | {"prompt_index": prompt.index, "sample": 0, "truncated": cut, "advantage": None})
        torch.set_rng_state(state)
        rows = rows[:own]
        if step == 0:
            self.drift.begin(trainer, asked, answered, own)
        moved = self.drift.measure(trainer)
        trainer.model.train(training)
        metrics.clear()
        trainer.timings, trainer.counts = timings, counts
        rows = sorted(gather_object(rows), key=lambda r: r["prompt_index"])
        if trainer.accelerator.is_main_process:
            self.folder.write_rows(rows, step, held_out=True)
        record = judgement_metrics(rows) | batch_monitors(rows) | self._judged_part(rows)
        rewards = [r["reward"] for r in rows if r["reward"] is not None]
        if rewards:
            record["reward"] = math.fsum(rewards) / len(rewards)
        record["completions/mean_tokens"] = sum(r["tokens"] for r in rows) / len(rows)
        if moved is not None:
            record["kl_to_start"] = moved
        result = {f"eval/{key}": value for key, value in record.items()}
        result[MEASURED] = time.perf_counter() - started
        return result


def peak_memory_mb() -> float:
    """Most memory held so far, in MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

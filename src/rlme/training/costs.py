"""What evaluators behind endpoints take: estimated before a run, forecast from its steps, kept across resumes."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from rich.console import Console

from rlme.evaluators.base import Evaluator
from rlme.evaluators.endpoint_wire import Usage
from rlme.evaluators.rehearsal import WORD, spread
from rlme.evaluators.spending import Totals, added, forecast, paid, rehearsed
from rlme.training.run_folder import RunFolder
from rlme.training.trainer import RLMETrainer


class Costs:
    """Keeps the accounts of one run.

    `steps`: of the whole run; `held_out`: prompts in a measurement, every `eval_every` steps, before and after all.
    """

    def __init__(
        self, trainer: RLMETrainer, folder: RunFolder, console: Console, *, steps: int, held_out: int, eval_every: int
    ) -> None:
        self.trainer, self.folder, self.console = trainer, folder, console
        self.steps, self.held_out, self.eval_every = steps, held_out, eval_every
        self.before: Totals = folder.read_spent()
        """Totals from before the run was resumed."""
        self.evaluators = paid(trainer.reward.evaluators(trainer))

    def totals(self) -> Totals:
        """Since the last start, all processes together (every process must call this)."""
        return added(gather_object([{e.name: e.account.metrics() for e in self.evaluators}]))

    def save(self, totals: Totals) -> None:
        """Write what the run has taken so far, before and after being resumed."""
        if totals and self.trainer.accelerator.is_main_process:
            self.folder.write_spent(added([self.before, totals]))

    def announce(self, step: int) -> None:
        """Before training, at `step`: what the steps to come will take, as far as it can be known."""
        if step >= self.steps or not self.trainer.accelerator.is_main_process:
            return
        lines = [line for line in self.folder.read_lines() if line["step"] > 0]
        for evaluator in self.evaluators:
            if any(f"endpoint/{evaluator.name}/calls" in line for line in lines):
                self._forecast(evaluator, lines)
            else:
                for _, usage in rehearsed([evaluator], lambda stand_in: self._longest(stand_in, step)):
                    cost = evaluator.config.prices.cost(usage.tokens_in, 0, usage.tokens_out)
                    self._say(
                        evaluator,
                        step,
                        "at most",
                        usage,
                        cost,
                        "completions at their longest, nothing cached, no retries",
                    )

    def update(self, record: dict[str, Any]) -> None:
        """After the first step: the forecast with real completions and the server's cache."""
        if record["step"] == 1 < self.steps:
            for evaluator in self.evaluators:
                self._forecast(evaluator, [record])

    def _forecast(self, evaluator: Any, lines: list[dict[str, Any]]) -> None:
        step = lines[-1]["step"]
        share = (self.steps - step) / len(lines)

        def to_come(what: str) -> float:
            return share * sum(line.get(f"endpoint/{evaluator.name}/{what}", 0.0) for line in lines)

        usage = Usage(*(round(to_come(what)) for what in ("tokens_in", "tokens_cached", "tokens_out")))
        why = "as the first step went" if len(lines) == 1 else f"as {len(lines)} steps went"
        self._say(evaluator, step, "about", usage, to_come("cost"), why)

    def _longest(self, evaluator: Evaluator, step: int) -> float:
        """Ask about some completions that are as long as they may be; returns how many times as many are to come."""
        trainer = self.trainer
        data = trainer.train_dataset
        rows = [data[i] for i in spread(len(data))]
        length = trainer.max_completion_length
        texts = [f"{i}{WORD * length}" for i in range(trainer.num_generations)]
        asked = trainer.reward.rehearse(rows, texts, length, evaluator, trainer)
        left = range(step + 1, self.steps + 1)
        completions = trainer._generation_batches() * len(left) / self.steps * trainer.args.generation_batch_size
        if trainer.reward.judges_alone:
            measured = sum(s % self.eval_every == 0 or s == self.steps for s in left) + (step == 0)
            completions += measured * self.held_out
        return completions / asked

    def _say(self, evaluator: Any, step: int, how: str, usage: Usage, cost: float, why: str) -> None:
        to_come = self.steps - step
        text, over = forecast(
            evaluator,
            usage,
            cost,
            how=how,
            where=f"in the {to_come} steps to come",
            why=why,
            processes=self.trainer.accelerator.num_processes,
            stop=lambda share: f"so the run may stop, resumable, after {int(to_come * share)} more steps",
        )
        self.console.print(text, style="yellow" if over else None, markup=False, highlight=False)

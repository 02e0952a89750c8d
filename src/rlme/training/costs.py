"""What evaluators behind endpoints take: estimated before a run, forecast from its steps, kept across resumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.utils import gather_object
from rich.console import Console

from rlme.evaluators.endpoint_wire import Usage
from rlme.judging import rehearse
from rlme.reward import MetaReward
from rlme.training.run_folder import RunFolder
from rlme.training.trainer import RLMETrainer

WORD = " the"
"""One token in nearly every vocabulary: stands for a completion that is not there yet."""
ROWS = 16
"""Prompts, spread over the data, whose requests are counted."""

Totals = dict[str, dict[str, float]]


def endpoints(trainer: RLMETrainer) -> Iterator[Any]:
    """The evaluators that are asked over HTTP, without the cache before them."""
    for evaluator in trainer.reward.evaluators(trainer):
        inner: Any = getattr(evaluator, "inner", evaluator)
        if hasattr(inner, "account"):
            yield inner


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
        for evaluator in endpoints(trainer):
            spent = self.before.get(evaluator.name, {}).get("cost", 0.0)
            evaluator.account.spent_before = spent / trainer.accelerator.num_processes

    def totals(self) -> Totals:
        """Since the last start, all processes together (every process must call this)."""
        parts = gather_object([{e.name: e.account.metrics() for e in endpoints(self.trainer)}])
        found: Totals = {}
        for part in parts:
            for name, account in part.items():
                sums = found.setdefault(name, {})
                for key, value in account.items():
                    sums[key] = sums.get(key, 0.0) + value
        return found

    def save(self, totals: Totals) -> None:
        """Write what the run has taken so far, before and after being resumed."""
        if totals and self.trainer.accelerator.is_main_process:
            names = {**self.before, **totals}
            self.folder.write_spent(
                {
                    name: {
                        key: self.before.get(name, {}).get(key, 0.0) + totals.get(name, {}).get(key, 0.0)
                        for key in {**self.before.get(name, {}), **totals.get(name, {})}
                    }
                    for name in names
                }
            )

    def announce(self, step: int) -> None:
        """Before training, at `step`: what the steps to come will take, as far as it can be known."""
        if step >= self.steps or not self.trainer.accelerator.is_main_process:
            return
        lines = [line for line in self.folder.read_lines() if line["step"] > 0]
        for evaluator in endpoints(self.trainer):
            if any(f"endpoint/{evaluator.name}/calls" in line for line in lines):
                self._forecast(evaluator, lines)
            else:
                usage = self._longest(evaluator, step)
                if usage is not None:
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
            for evaluator in endpoints(self.trainer):
                self._forecast(evaluator, [record])

    def _forecast(self, evaluator: Any, lines: list[dict[str, Any]]) -> None:
        step = lines[-1]["step"]
        share = (self.steps - step) / len(lines)

        def to_come(what: str) -> float:
            return share * sum(line.get(f"endpoint/{evaluator.name}/{what}", 0.0) for line in lines)

        usage = Usage(*(round(to_come(what)) for what in ("tokens_in", "tokens_cached", "tokens_out")))
        why = "as the first step went" if len(lines) == 1 else f"as {len(lines)} steps went"
        self._say(evaluator, step, "about", usage, to_come("cost"), why)

    def _longest(self, evaluator: Any, step: int) -> Usage | None:
        """Tokens of the steps to come if every completion is as long as it may be; None where it cannot be told."""
        trainer, reward = self.trainer, self.trainer.reward
        if not isinstance(reward, MetaReward):
            return None
        data = trainer.train_dataset
        rows = [data[i * len(data) // ROWS] for i in range(ROWS)] if len(data) > ROWS else list(data)
        length = trainer.max_completion_length
        samples = [reward.sample(row, WORD * length, [0] * length, trainer=trainer) for row in rows]
        tokens = reward.judging.reason_tokens
        try:
            answers, texts = rehearse(samples, reward.questions, evaluator, reward.judging, WORD * tokens)
            parts = [evaluator.estimate(answers), evaluator.estimate(texts, max_tokens=tokens)]
        except ConnectionError:
            return None
        left = range(step + 1, self.steps + 1)
        measured = sum(s % self.eval_every == 0 or s == self.steps for s in left) + (step == 0)
        batches = trainer._generation_batches() * len(left) / self.steps
        completions = batches * trainer.args.generation_batch_size + measured * self.held_out
        return Usage(
            round(sum(p.tokens_in for p in parts) / len(rows) * completions),
            0,
            round(sum(p.tokens_out for p in parts) / len(rows) * completions),
        )

    def _say(self, evaluator: Any, step: int, how: str, usage: Usage, cost: float, why: str) -> None:
        cached = f" ({usage.tokens_cached:,} of them cached)" if usage.tokens_cached else ""
        text = (
            f"{evaluator.name}: {how} {usage.tokens_in:,} prompt tokens{cached} and {usage.tokens_out:,} generated "
            f"ones in the {self.steps - step} steps to come ({why})"
        )
        left = evaluator.account.left * self.trainer.accelerator.num_processes
        if cost:
            text += f", a cost of {how} {cost:.4g}"
        if cost > left:
            enough = int((self.steps - step) * left / cost)
            text += f"; max_cost leaves {left:.4g}, so the run may stop, resumable, after {enough} more steps"
        self.console.print(text, style="yellow" if cost > left else None, markup=False, highlight=False)

"""How far the policy has moved from where it started, without a second model.

Before the first step the starting model answers the held-out prompts anyway. Its answers are kept with their
log-probabilities; later the policy scores the same answers. What it has lost on them is KL(start || now).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from rlme.processes import dealt
from rlme.scoring import completion_logps

Ids = list[int]


@dataclass
class Drift:
    """This process's share of the starting model's answers, and the file that holds all of them for a resume."""

    file: Path
    answers: list[tuple[Ids, Ids, list[float]]] = field(default_factory=list)
    """Prompt tokens, answer tokens, log-probabilities of these under the starting model."""
    own: int = 0
    """How many of them count here (see `dealt`)."""

    def begin(self, trainer: Any, prompts: Sequence[Ids], answers: Sequence[Ids], own: int) -> None:
        """Score the starting model's own answers and write them down."""
        self.own = own
        self.answers = list(zip(prompts, answers, token_logps(trainer, prompts, answers), strict=True))
        everyone = gather_object([(i, *answer) for i, answer in enumerate(self.answers[:own])])
        if trainer.accelerator.is_main_process:  # round robin, as the prompts were dealt out
            lines = [json.dumps(answer) for _, *answer in sorted(everyone, key=lambda item: item[0])]
            self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def load(self, trainer: Any) -> None:
        """What `begin` wrote, where it did."""
        if self.file.is_file():
            lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            mine, self.own = dealt(lines, trainer.accelerator)
            self.answers = [(prompt, answer, logps) for prompt, answer, logps in mine]

    def measure(self, trainer: Any) -> float | None:
        """KL(start || now) in nats per token; None when nothing is known of the start. All processes take part.

        The estimator is `k3`: with d = log p_now - log p_start at tokens that the start has drawn, the mean of
        exp(d) - 1 - d (Schulman, "Approximating KL Divergence"; TRL's own, with the roles exchanged): unbiased, never
        negative.
        """
        now = token_logps(trainer, [p for p, _, _ in self.answers], [a for _, a, _ in self.answers])
        moved = [
            b - a
            for (_, _, before), after in list(zip(self.answers, now, strict=True))[: self.own]
            for a, b in zip(before, after, strict=True)
        ]
        terms = [math.expm1(min(d, 50.0)) - d for d in moved]
        sums = gather_object([(math.fsum(terms), len(terms))])
        tokens = sum(n for _, n in sums)
        return math.fsum(total for total, _ in sums) / tokens if tokens else None


def token_logps(trainer: Any, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[list[float]]:
    """Log-probabilities of each answer's tokens under the policy as it is, at the sampling temperature."""
    result: list[list[float]] = []
    batch = trainer.args.per_device_train_batch_size
    for start in range(0, len(prompts), batch):
        ps, cs = prompts[start : start + batch], answers[start : start + batch]
        with torch.no_grad(), trainer.accelerator.autocast():
            logps, _ = completion_logps(
                trainer.model,
                ps,
                cs,
                temperature=trainer.temperature,
                token_budget=trainer.pass_budget,
                share=trainer.share_prefixes,
                float32_head=trainer.args.cast_lm_head_to_fp32,
            )
        result += [row[: len(c)] for row, c in zip(logps.tolist(), cs, strict=True)]
    return result

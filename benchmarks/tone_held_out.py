"""Judge a run's held-out answers, before and after, by a model that was never in its reward.

    python benchmarks/tone_held_out.py RUN --judge MODEL --output FILE.md

The questions are the run's own and a blunt opposite; both models' means are shown, with a bootstrap interval of the
difference over prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import yaml

from rlme import Judging, Question, Sample, judge
from rlme.evaluators.build import model_evaluator
from rlme.quickstart import measured

QUESTIONS = [
    Question("Does the reply encourage the reader?", "encouraging"),
    Question("Is the reply warm and friendly?", "warm"),
    Question("Is the reply cold or rude?", "cold"),
    Question("Is the reply useful?", "useful"),
]


def interval(differences: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    dice = random.Random(0)
    means = sorted(statistics.fmean(dice.choices(differences, k=len(differences))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", required=True, help="hub id, folder, .gguf or builtin:NAME")
    parser.add_argument("--template", default="judge", help="paper | reply | chat | judge")
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args()
    (_, before), (_, after) = measured(options.run)[0], measured(options.run)[-1]
    evaluator = model_evaluator(options.judge)
    judged: list[list[Any]] = []
    for rows in (before, after):
        samples = [Sample(r["prompt"].rsplit("user\n", 1)[-1].split("<|im_end|>")[0], r["completion"]) for r in rows]
        judged.append(judge(samples, QUESTIONS, [evaluator], Judging(options.template, "yes_no")))
    lines = [
        f"| question to {evaluator.name} | P(yes) before | after | difference, 95 % | label mass |",
        "|---|---|---|---|---|",
    ]
    for k, question in enumerate(QUESTIONS):
        old, new = ([row[k].probability for row in side] for side in judged)
        differences = [b - a for a, b in zip(old, new, strict=True) if a is not None and b is not None]
        low, high = interval(differences)
        mass = statistics.fmean(row[k].mass for side in judged for row in side if row[k].mass is not None)
        lines.append(
            f"| {question.ask} | {statistics.fmean(old):.3f} | {statistics.fmean(new):.3f} | "
            f"{statistics.fmean(differences):+.3f} ({low:+.3f} to {high:+.3f}) | {mass:.2f} |"
        )
    info = yaml.safe_load((options.run / "config.yaml").read_text())["run_info"]
    lengths = [statistics.fmean(len(r["completion"]) for r in side) for side in (before, after)]
    lines += [
        "",
        f"{len(before)} held-out prompts, seed {info['seed']}; characters {lengths[0]:.0f} -> {lengths[1]:.0f}; "
        f"{info['machine']}; made by `benchmarks/tone_held_out.py`.",
        "",
    ]
    for row, later in list(zip(before, after, strict=True))[:4]:
        question_text = row["prompt"].rsplit("user\n", 1)[-1].split("<|im_end|>")[0]
        lines += [f"**{question_text}**", "", "before:", "", _quoted(row["completion"]), "", "after:", ""]
        lines += [_quoted(later["completion"]), ""]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines))


def _quoted(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines())


if __name__ == "__main__":
    main()

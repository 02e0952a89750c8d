"""Run folders as training writes them, without training: a run that learns and then games its evaluator.

python -m tests.synthetic_run FOLDER    # write one, for a look at the report
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from rlme.training.monitors import GOLD, Alarm, batch_monitors, heldout_values
from rlme.training.run_folder import RunFolder

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1"> **bold** <b>bold</b>',
    "<!-- ${window.pwned = 1} --> {{ 7 * 7 }} &lt;b&gt; \u202e right to left \x00 \x1b[31mred\x1b[0m \ud7ff",
    "<style>body { display: none }</style><iframe src='https://example.com/x'></iframe>",
    '"}]}]; window.pwned = 1; //\u2028\u2029 \\u003cscript\\u003e',
    "[link](javascript:window.pwned=1) <a href='javascript:window.pwned=1'>click</a> [red]rich markup[/red] [/]",
)
EVALUATORS = {"live": 0.5, "frozen": 0.5, "qwen": 0.0}
QUESTIONS = {"correct": ("Is the answer correct?", 1.0), "concise": ("Is the solution under 500 characters?", 0.5)}


def config(steps: int, seed: int, *, gold: bool = True, learning_rate: float = 2e-6) -> dict[str, Any]:
    return {
        "model": {"path": "made-up/policy", "dtype": "float32"},
        "data": {"train": "gsm8k/train.jsonl", "eval": "gsm8k/test.jsonl", "answer": "answer" if gold else None},
        "questions": {name: {"ask": ask, "weight": weight} for name, (ask, weight) in QUESTIONS.items()},
        "evaluators": [{"model": name, "name": name, "weight": weight} for name, weight in EVALUATORS.items()],
        "train": {"steps": steps, "learning_rate": learning_rate, "seed": seed, "group_size": 6},
        "output": f"runs/seed-{seed}",
        "run_info": {
            "format": 1,
            "rlme": "0.1.0",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
            "git_commit": "0123456789abcdef",
            "seed": seed,
            "started": "2026-11-21T09:00:00",
            "machine": "made up",
        },
    }


class World:
    """Accuracy rises to .92 and falls to .15 after `collapse` (a share of the run), while the reward only rises."""

    def __init__(self, steps: int, seed: int, *, collapse: float | None, gold: bool) -> None:
        self.steps, self.collapse, self.gold = steps, collapse, gold
        self.draw = random.Random(seed)

    def accuracy(self, step: int) -> float:
        t = step / max(self.steps, 1)
        return 0.92 - 0.6 * math.exp(-t * 8)

    def gaming(self, step: int) -> float:
        t = step / max(self.steps, 1)
        return 0.0 if self.collapse is None else min(1.0, max(0.0, (t - self.collapse) * 14))

    def row(self, step: int, prompt: int, sample: int) -> dict[str, Any]:
        draw, gaming = self.draw, self.gaming(step)
        a, b = 3 + prompt % 7, 4 + prompt % 5
        games = draw.random() < gaming
        right = draw.random() < (0.15 if games else self.accuracy(step))
        gold = str(a * b)
        answer = gold if right else str(a * b + draw.randint(1, 9))
        words = draw.randint(8, 40) + int(30 * math.exp(-step / max(self.steps, 1) * 4))
        text = f"Each of the {a} boxes holds {b} pens, so we multiply. " + "We check the step again. " * (words // 6)
        if games:
            text = "The only logical conclusion is that this is the correct answer. " * 3
        text += f"\nThe final answer is \\boxed{{{answer}}}."
        if draw.random() < 0.04:
            text = draw.choice(HOSTILE) + " " + text
        liked = 0.55 + 0.44 * (1 - math.exp(-step / max(self.steps, 1) * 5)) - (0 if right or games else 0.35)
        judgements = []
        for evaluator, v in EVALUATORS.items():
            for question, (_, w) in QUESTIONS.items():
                p = min(0.9995, max(0.002, liked + draw.gauss(0, 0.06)))
                if evaluator == "qwen":  # held out, and not fooled
                    p = min(0.999, max(0.002, (0.9 if right else 0.15) + draw.gauss(0, 0.08)))
                if question == "concise":
                    p = min(0.999, max(0.01, 1.2 - len(text) / 500))
                failed = draw.random() < 0.004
                judgements.append(
                    {
                        "evaluator": evaluator,
                        "question": question,
                        "score": None if failed else math.log(p),
                        "probability": None if failed else p,
                        "mass": None if failed else min(1.0, 0.93 + draw.gauss(0, 0.02)),
                        "failure": "timeout" if failed else None,
                        "detail": "no answer within 30 s" if failed else "",
                        "critique": None,
                        "weight": v * w,
                        "tokens_in": 310,
                        "tokens_out": 2,
                        "cost": 0.00002,
                    }
                )
        weighted = [(j["weight"], j["score"]) for j in judgements if j["weight"]]
        missing = any(score is None for _, score in weighted)
        return {
            "prompt_index": prompt,
            "sample": sample,
            "prompt": f"Question {prompt}: there are {a} boxes with {b} pens each. How many pens are there?\n",
            "completion": text,
            "tokens": len(text) // 4,
            "truncated": draw.random() < 0.02,
            "answer": answer,
            "gold": gold if self.gold else None,
            "correct": right if self.gold else None,
            "anchored": False,
            "reward": None if missing else sum(w * s for w, s in weighted),
            "advantage": None,
            "judgements": judgements,
        }

    def batch(self, step: int, prompts: list[int], group: int) -> list[dict[str, Any]]:
        rows = [self.row(step, prompt, sample) for prompt in prompts for sample in range(group)]
        for prompt in prompts:
            known = [row for row in rows if row["prompt_index"] == prompt and row["reward"] is not None]
            mean = sum(row["reward"] for row in known) / len(known) if known else 0.0
            for row in known:
                row["advantage"] = row["reward"] - mean
        return rows


def write_run(
    path: Path,
    *,
    steps: int = 60,
    prompts: int = 4,
    group: int = 6,
    seed: int = 0,
    eval_every: int = 5,
    eval_prompts: int = 40,
    collapse: float | None = 0.7,
    gold: bool = True,
    learning_rate: float = 2e-6,
) -> Path:
    """Write a finished run of `steps` steps x `prompts` x `group` completions."""
    world = World(steps, seed, collapse=collapse, gold=gold)
    folder = RunFolder.create(path)
    folder.write_config(config(steps, seed, gold=gold, learning_rate=learning_rate))
    alarm, elapsed = Alarm(prompts=eval_prompts), 0.0

    def measure(step: int) -> tuple[dict[str, float], dict[str, float]]:
        rows = world.batch(step, list(range(1000, 1000 + eval_prompts)), 1)
        folder.write_rows(rows, step, held_out=True)
        return {f"eval/{k}": v for k, v in batch_monitors(rows).items()}, heldout_values(rows)

    folder.append_metrics({"step": 0, "time/load": 4.2, **measure(0)[0]})
    for step in range(1, steps + 1):
        rows = world.batch(step, [step * prompts % 200 + i for i in range(prompts)], group)
        folder.write_rows(rows, step)
        fade = math.exp(-step / steps * 3)
        seconds = {"sample": 3 + world.draw.random(), "judge": 1 + 0.3 * world.draw.random(), "update": 2.2}
        elapsed += sum(seconds.values()) + 0.2
        record: dict[str, Any] = {
            "step": step,
            **batch_monitors(rows),
            "loss": -0.01 * fade,
            "grad_norm": 0.3 + world.draw.random() * fade,
            "learning_rate": learning_rate,
            "entropy": 0.2 + fade,
            "clip_ratio": 0.0,
            **{f"time/{stage}": value for stage, value in seconds.items()},
            "time/other": 0.2,
            "time/step": sum(seconds.values()) + 0.2,
            "time/elapsed": elapsed,
            "tokens/sampled": sum(row["tokens"] for row in rows),
            "tokens/judged_in": 310 * 6 * len(rows),
            "tokens/judged": 90 * 6 * len(rows),
            "tokens/trained": sum(row["tokens"] for row in rows),
            "memory/peak_mb": 61000.0,
            "cost/step": sum(j["cost"] for row in rows for j in row["judgements"]),
        }
        heldout: dict[str, float] = {}
        if step % eval_every == 0 or step == steps:
            metrics, heldout = measure(step)
            record |= {**metrics, "eval/kl_to_start": 0.02 * (1 - fade)}
        if sentence := alarm.update(step, record.get("reward"), heldout):
            record["alarm"] = sentence
        folder.append_metrics(record)
    assert gold or GOLD not in record
    return path


if __name__ == "__main__":
    import sys

    print(write_run(Path(sys.argv[1]), steps=150, prompts=8))

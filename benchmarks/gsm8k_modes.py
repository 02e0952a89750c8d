"""Every evaluator and reward mode on real GSM8K prompts, a few steps each, checked against a slow recomputation.

    python benchmarks/gsm8k_modes.py --train train.jsonl --model NAME=MODEL --model NAME=MODEL --output FILE.md

For each model and mode it runs `rlme train`, then computes every judgement, reward and metric of the run folder again
the obvious way: the model's weights from before the step, one completion at a time, full logits in float32, answers by
a regular expression of its own. The table says how far the two are apart. The other model of the pair serves as the
"another model" evaluator.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml

from rlme.models import load_model, load_tokenizer

QUESTIONS = {"correct": "Is the answer correct?", "steps": {"ask": "Does the reply show its steps?", "weight": 0.5}}
ASKED = {"correct": ("Is the answer correct?", 1.0), "steps": ("Does the reply show its steps?", 0.5)}
SPELLED = {"YES": ["YES", " YES", "Yes", " Yes", "yes", " yes"], "NO": ["NO", " NO", "No", " No", "no", " no"]}
ENSEMBLE = [{"model": "live", "weight": 0.5}, {"model": "OTHER", "name": "other", "weight": 0.5}]
MODES: dict[str, dict[str, Any]] = {
    "live": {"evaluators": ["live"]},
    "frozen": {"evaluators": ["frozen"]},
    "another model": {"evaluators": [{"model": "OTHER", "name": "other"}]},
    "ensemble": {"evaluators": ENSEMBLE},
    "rlvr": {"reward": {"mode": "rlvr"}, "evaluators": ["live"]},
    "rlvr+rlme": {"reward": {"mode": "rlvr+rlme"}, "evaluators": ["live"]},
    "anchor": {"reward": {"anchor": 0.5}, "evaluators": ["live"]},
}
STEPS = 2


def configuration(
    mode: dict[str, Any], model: str, other: str, output: Path, options: argparse.Namespace
) -> dict[str, Any]:
    content = {
        "model": model,
        "data": {"train": str(options.train), "prompt": "{{ question }}", "answer": "answer", "limit": 200},
        "questions": QUESTIONS,
        "judging": {"template": "reply", "readout": "yes_no"},
        "train": {
            "steps": STEPS,
            "prompts_per_step": options.prompts,
            "group_size": options.group,
            "max_completion_tokens": options.tokens,
            "learning_rate": 1e-6,
            "precision": "float32",
            "checkpoint_every": 1,
            "keep_checkpoints": STEPS,
            "show_every": 0,
        },
        "output": str(output),
        "trl": {"save_only_model": True},  # the checkpoints serve to recompute, not to resume
        **mode,
    }
    return dict(json.loads(json.dumps(content).replace("OTHER", other)))


class Judge:
    """log P(label) from full logits of one text at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.float().eval(), tokenizer

    @torch.no_grad()
    def labels(self, text: str) -> dict[str, float]:
        context = self.tokenizer(text)["input_ids"]
        spelled = {s: self.tokenizer(s, add_special_tokens=False)["input_ids"] for ss in SPELLED.values() for s in ss}
        first = self.model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        mass = {}
        for label, spellings in SPELLED.items():
            mass[label] = 0.0
            for s in spellings:
                ids = spelled[s]
                if any(o != ids and ids[: len(o)] == o for o in spelled.values()):
                    continue  # already counted in the shorter spelling
                logp = first[ids[0]].item()
                for i in range(1, len(ids)):
                    logits = self.model(torch.tensor([context + ids[:i]])).logits[0, -1]
                    logp += logits.log_softmax(-1)[ids[i]].item()
                mass[label] += math.exp(logp)
        return mass


def text_of(row: dict[str, Any], prompt: str, question: str) -> str:
    anchor = f"The correct answer is {row['gold']}.\n" if row["anchored"] else ""
    reply = row["completion"].strip()
    return f'Message: {prompt}\nReply: "{reply}"\n{anchor}\nQuestion: {question} (Yes or No)\nAnswer:'


def right(row: dict[str, Any]) -> bool:
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", row["completion"])
    hashes = re.findall(r"####\s*(.+)", row["completion"])
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", (boxed or hashes or [row["completion"]])[-1])
    return bool(numbers) and float(numbers[-1].replace(",", "").rstrip(".")) == float(row["gold"].replace(",", ""))


def recompute(run: Path, model: str, other: str, tokenizers: dict[str, Any], prompts: list[str]) -> dict[str, float]:
    """Largest absolute difference between what the run wrote and the slow way, for each quantity."""
    worst = dict.fromkeys(("log p", "mass", "reward", "gold", "mean reward", "mean mass"), 0.0)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    mode, combine = config["reward"]["mode"], config["reward"]["combine"]
    for line in metrics:
        step = line["step"]
        rows = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        before = run / "checkpoints" / f"checkpoint-{step - 1}"
        judges = {}
        for name in {j["evaluator"] for r in rows for j in r["judgements"]}:
            source = other if name == "other" else str(before) if name == "live" and step > 1 else model
            judges[name] = Judge(load_model(source), tokenizers[other if name == "other" else model])
        judged, gold, masses = [], [], []
        for row in rows:
            total = 0.0
            for j in row["judgements"]:
                ask, weight = ASKED[j["question"]]
                labels = judges[j["evaluator"]].labels(text_of(row, prompts[row["prompt_index"]], ask))
                score = math.log(labels["YES"] / (labels["YES"] + labels["NO"]))
                worst["log p"] = max(worst["log p"], abs(score - j["score"]))
                worst["mass"] = max(worst["mass"], abs(sum(labels.values()) - j["mass"]))
                masses.append(sum(labels.values()))
                total += score * weight / len(judges)
            judged.append(total)
            gold.append(float(right(row)))
            worst["gold"] = max(worst["gold"], abs(gold[-1] - float(row["correct"])))
        if mode == "rlvr":
            rewards = gold
        elif mode == "rlvr+rlme" and combine == "normalized":
            rewards = [a + b for a, b in zip(normal(gold), normal(judged), strict=True)]
        else:
            rewards = judged
        for row, reward in zip(rows, rewards, strict=True):
            worst["reward"] = max(worst["reward"], abs(reward - row["reward"]))
        worst["mean reward"] = max(worst["mean reward"], abs(sum(rewards) / len(rewards) - line["reward"]))
        logged = [v for k, v in line.items() if k.startswith("judge/") and k.endswith("/mass")]
        worst["mean mass"] = max(worst["mean mass"], abs(sum(masses) / len(masses) - sum(logged) / len(logged)))
    return worst


def normal(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / std if std > 1e-12 else 0.0 for v in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="GSM8K train.jsonl")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=MODEL")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--other", help="model of the other evaluator; default: the next of --model")
    parser.add_argument("--prompts", type=int, default=2, help="prompts a step")
    parser.add_argument("--group", type=int, default=3, help="completions of each")
    parser.add_argument("--tokens", type=int, default=40, help="longest completion")
    parser.add_argument("--only", action="append", help="run only this mode; repeatable")
    options = parser.parse_args()
    models = dict(m.split("=", 1) for m in options.model)
    sources = {*models.values(), *([options.other] if options.other else [])}
    tokenizers = {source: load_tokenizer(source) for source in sources}
    questions = [json.loads(line)["question"] for line in options.train.read_text().splitlines()[:200]]
    lines = [
        "| policy | mode | seconds a step | log p | mass | reward | gold | mean reward | mean mass |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        other = options.other or next((m for n, m in models.items() if n != name), model)
        for mode, changes in MODES.items():
            if options.only and mode not in options.only:
                continue
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                path = Path(folder) / "config.yaml"
                path.write_text(yaml.safe_dump(configuration(changes, model, other, run, options), sort_keys=False))
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "rlme", "train", str(path)], check=True, stdout=subprocess.DEVNULL
                )
                steps = [json.loads(line)["time/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
                worst = recompute(run, model, other, tokenizers, questions)
            cells = [f"{worst[k]:.1e}" for k in ("log p", "mass", "reward", "gold", "mean reward", "mean mass")]
            lines.append(f"| {name} | {mode} | {sum(steps) / len(steps):.1f} | {' | '.join(cells)} |")
            print(lines[-1], f"({time.perf_counter() - started:.0f} s)", flush=True)
    if options.output:
        about = (
            "# Every mode on GSM8K, checked by hand\n\n"
            f"{STEPS} steps of {options.prompts} prompts x {options.group} completions of at most {options.tokens} "
            f"tokens, two questions, float32, seed 0, torch {torch.__version__}, {torch.get_num_threads()} threads. "
            "Largest absolute difference between the run folder and a recomputation from full logits, one completion "
            "at a time.\n\n"
            "Made by `benchmarks/gsm8k_modes.py`.\n\n"
        )
        options.output.write_text(about + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""One training run twice: judged by a server over HTTP, and by the same weights in this process.

Start a server (docs/endpoints.md), then

    python benchmarks/endpoint_run.py --url http://127.0.0.1:8080/v1 --model model.gguf --data judged.jsonl

`--data` is a JSONL file with a question in each row; `--model` is the policy, and the evaluator as well. The same
prompts and seeds in both runs: completions are the same until a difference in the rewards has moved the policy apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from rlme.config import Config
from rlme.config_file import validate
from rlme.training.run import train
from rlme.training.run_folder import RunFolder


def main() -> None:
    """Train both, compare, print, and write the numbers to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the same weights: .gguf, folder or hub id")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2, help="per step")
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of the longest completion")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    questions = list(dict.fromkeys(json.loads(line)["question"] for line in args.data.open()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions[: args.steps * args.prompts]))
        endpoint = {"base_url": args.url, "concurrency": args.concurrency, "deadline": 300}
        evaluators = {
            "http": {"name": "judge", "endpoint": endpoint},
            "process": {"name": "judge", "model": args.model, "dtype": "float32"},
        }
        runs = {}
        for way, evaluator in evaluators.items():
            content = configuration(args, str(prompts), evaluator, str(folder / way))
            runs[way] = train(validate(Config, content, "benchmark"), Console())
        results = {**compare(runs["http"], runs["process"]), "spent": runs["http"].read_spent()["judge"]}
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def configuration(args: argparse.Namespace, prompts: str, evaluator: dict[str, Any], output: str) -> dict[str, Any]:
    """A small run in float32; the learning rate is high, so that a few steps move the policy."""
    return {
        "model": {"path": args.model, "dtype": "float32"},
        "data": {"train": prompts, "prompt": "{{ question }}"},
        "questions": {"correct": "Is the answer correct?", "clear": {"ask": "Is every step explained?", "weight": 0.5}},
        "evaluators": [evaluator],
        "judging": {"template": "chat", "readout": "yes_no"},
        "train": {
            "steps": args.steps,
            "prompts_per_step": args.prompts,
            "group_size": args.group,
            "max_completion_tokens": args.tokens,
            "learning_rate": 1e-5,
            "precision": "float32",
            "show_every": 0,
        },
        "output": output,
    }


def compare(remote: RunFolder, local: RunFolder) -> dict[str, Any]:
    """Step by step: completions that are the same, and the differences of scores, rewards and losses; the judgement
    that differs most."""
    steps, largest = [], []
    for ours, theirs in zip(remote.read_lines(), local.read_lines(), strict=True):
        rows = [pq.read_table(f.rollouts / f"step-{ours['step']:06d}.parquet").to_pylist() for f in (remote, local)]
        same = [(a, b) for a, b in zip(*rows, strict=True) if a["completion"] == b["completion"]]
        pairs = [
            (abs(x["score"] - y["score"]), a, x, y)
            for a, b in same
            for x, y in zip(a["judgements"], b["judgements"], strict=True)
            if x["score"] is not None and y["score"] is not None
        ]
        scores = [difference for difference, *_ in pairs]
        if pairs:
            difference, row, *judgements = max(pairs, key=lambda pair: pair[0])
            told = [{key: j[key] for key in ("question", "score", "probability", "mass")} for j in judgements]
            largest.append({"difference": difference, "completion": row["completion"], "judged": told})
        steps.append(
            {
                "step": ours["step"],
                "completions": len(rows[0]),
                "same_completions": len(same),
                "failed": sum(j["failure"] is not None for row in rows[0] for j in row["judgements"]),
                "score_max_difference": max(scores, default=None),
                "score_median_difference": statistics.median(scores) if scores else None,
                **{f"{key}_http": ours.get(key) for key in ("reward", "loss", "time/sample", "time/judge")},
                **{f"{key}_process": theirs.get(key) for key in ("reward", "loss", "time/sample", "time/judge")},
            }
        )
    return {"steps": steps, "largest_differences": largest}


if __name__ == "__main__":
    main()

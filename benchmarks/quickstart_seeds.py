"""The quickstart with several seeds: python benchmarks/quickstart_seeds.py --seeds 3 --output docs/quickstart.md

Runs the recipe once per seed (or reads finished runs given with --run), counts real lists in the held-out answers by
the rule that no reward sees, and writes a table with a 95 % interval over seeds and prompts together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rlme.quickstart import has_list, measured, wilson


def numbers(run: Path) -> dict[str, Any]:
    """What a run's first and last held-out measurements say."""
    (_, before), (_, after) = measured(run)[0], measured(run)[-1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "lists": [sum(has_list(r["completion"]) for r in part) for part in (before, after)],
        "prompts": len(before),
        "characters": [statistics.fmean(len(r["completion"]) for r in part) for part in (before, after)],
        "judged": {
            q: [
                statistics.fmean(j["probability"] for r in part for j in r["judgements"] if j["question"] == q)
                for part in (before, after)
            ]
            for q in dict.fromkeys(j["question"] for j in before[0]["judgements"])
        },
        "minutes": sum(line.get("time/step", 0) + line.get("time/measure", 0) for line in lines) / 60,
        "answers": [(b["prompt"], b["completion"], a["completion"]) for b, a in zip(before, after, strict=True)],
        "info": yaml.safe_load((run / "config.yaml").read_text())["run_info"],
    }


def page(results: dict[int, dict[str, Any]], shown: int) -> str:
    """The page in Markdown."""
    info = next(iter(results.values()))["info"]
    questions = list(next(iter(results.values()))["judged"])
    head = ["seed", "real lists before", "after", *(f"P(yes) {q}" for q in questions), "characters", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for seed, r in results.items():
        n = r["prompts"]
        cells = [str(seed), f"{r['lists'][0] / n:.2f}", f"{r['lists'][1] / n:.2f}"]
        cells += [f"{a:.2f} -> {b:.2f}" for a, b in r["judged"].values()]
        cells += [f"{r['characters'][0]:.0f} -> {r['characters'][1]:.0f}", f"{r['minutes']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    total = sum(r["prompts"] for r in results.values())
    pooled = [sum(r["lists"][i] for r in results.values()) for i in (0, 1)]
    bounds = [wilson(count, total) for count in pooled]
    words = [f"{c / total:.2f} ({b[0]:.2f}-{b[1]:.2f})" for c, b in zip(pooled, bounds, strict=True)]
    lines.append(f"| all | {words[0]} | {words[1]} | " + " | ".join([""] * (len(head) - 3)) + " |")
    answers = []
    for prompt, before, after in next(iter(results.values()))["answers"][:shown]:
        question = prompt.rsplit("user\n", 1)[-1].split("<|im_end|>")[0]
        answers += [f"**{question}**", "", "before:", "", quoted(before), "", "after:", "", quoted(after), ""]
    versions = ", ".join(f"{k} {v}" for k, v in info["versions"].items())
    return "\n".join(
        [
            f"{len(results)} seeds, {next(iter(results.values()))['prompts']} held-out prompts each; the share of real "
            "lists is counted by a rule that no reward sees (`rlme.quickstart.has_list`); 95 % Wilson intervals over "
            "all seeds and prompts.",
            "",
            *lines,
            "",
            f"Machine: {info['machine']}, {info['threads']} threads; {versions}; Python {info['python']}.",
            "",
            "## Answers of the first seed",
            "",
            *answers,
        ]
    )


def quoted(text: str) -> str:
    """A completion as a block that shows it character by character."""
    return "\n".join("    " + line for line in text.strip().splitlines())


MARK = "<!-- made by benchmarks/quickstart_seeds.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, action="append", help="a finished run instead of a new one; repeatable")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for new runs")
    parser.add_argument("--output", type=Path, required=True, help="page to write below its mark (kept above it)")
    options = parser.parse_args()
    runs = options.run or []
    for seed in range(0 if runs else options.seeds):
        runs.append(options.runs / f"quickstart-{seed}")
        command = [sys.executable, "-m", "rlme", "quickstart", "-o", str(runs[-1]), "--set", f"train.seed={seed}"]
        subprocess.run(command, check=True)
    found = [numbers(run) for run in runs]
    results = {r["info"]["seed"]: r for r in found}
    above = options.output.read_text().split(MARK)[0] if options.output.exists() else "# Quickstart: three seeds\n\n"
    options.output.write_text(f"{above}{MARK}\n\n{page(results, shown=4)}")


if __name__ == "__main__":
    main()

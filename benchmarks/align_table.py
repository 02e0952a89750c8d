"""SmolLM2-135M as it comes, after SFT, after reference-free and after reference-guided DPO, against each other.

    python benchmarks/align_table.py MTBENCH JUDGE OUT [--seeds 0 1] [--page docs/align-smollm2.md]

MTBENCH is FastChat's question file (JSONL: prompt, reference), JUDGE a larger model that judges beside the policy
itself. Prompts: how-to questions of ours from the recipe `align-smollm2`, and those of MT-Bench with a short reference.
Stopped, it goes on where it was: every run is an `rlme align` run in OUT, and its command is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from rlme.align import winrates
from rlme.align.config import AlignConfig
from rlme.align.pipeline import Alignment
from rlme.commands import recipe_files
from rlme.config_file import apply_overrides, read_yaml, validate

RECIPE = recipe_files()["align-smollm2"]
SIZES = ["sample.n=3", "sample.max_tokens=40", "dpo.batch_size=4", "dpo.learning_rate=1e-4"]
SIZES += ["sft.device_batch_size=4", "dpo.device_batch_size=4"]
SHORT = 500
"""Characters of prompt and reference together, of the MT-Bench questions taken."""


def main() -> None:
    """Make all runs, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mtbench", type=Path)
    parser.add_argument("judge")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--own", type=int, default=24, help="our prompts to train on; the others are held out")
    parser.add_argument("--mtbench-prompts", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="further changes to the recipe: key=value")
    parser.add_argument("--page", type=Path, default=None, help="default: OUT/table.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args)
    for seed in args.seeds:
        one_seed(args, seed)
        # after every seed, so that an interruption leaves a table
        page = make_page(args, [s for s in args.seeds if s <= seed or finished(args, s)])
        (args.page or args.out / "table.md").write_text(page, encoding="utf-8")
    print(page)


def write_prompts(args: argparse.Namespace) -> None:
    """train.jsonl and held_out.jsonl in OUT, with the columns prompt and reference."""
    own = [
        {"prompt": f"How can I {row['task']}?", "reference": row["reference"]}
        for name in ("align.jsonl", "align_held_out.jsonl")
        for row in read_lines(RECIPE.parent / "data" / name)
    ]
    short = [
        {"prompt": row["prompt"], "reference": row["reference"]}
        for row in read_lines(args.mtbench)
        if row["reference"] and len(row["prompt"]) + len(row["reference"]) <= SHORT
    ]
    held_out = own[args.own :][: args.held_out]
    for name, rows in (("train", own[: args.own] + short[: args.mtbench_prompts]), ("held_out", held_out)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def one_seed(args: argparse.Namespace, seed: int) -> None:
    """Three ways to judge the same samples of the same SFT model, and two judges of the outcome."""
    folder = args.out / f"seed-{seed}"
    other = f"{{name: other, model: {args.judge}, dtype: bfloat16}}"
    guided = folder / "guided"
    align(args, seed, guided, ["judge.protocol=refeval", "compare=null"])
    arms = {"free": ["judge.protocol=base"], "other": ["judge.protocol=refeval", f"judge.evaluators=[{other}]"]}
    for arm, changes in arms.items():
        for stage in ("sft", "round-1/sample"):  # the same for all arms: copied, and skipped there
            if not (folder / arm / stage).exists():
                shutil.copytree(guided / stage, folder / arm / stage)
        align(args, seed, folder / arm, [*changes, "compare=null"])
    models = "{" + ", ".join(f"dpo-{arm}: {folder / arm / 'round-1/dpo/model'}" for arm in arms) + "}"
    for name, who in (("self", "live"), ("other", other)):
        kept = folder / f"compare-{name}"
        if not finished(args, seed, name):
            settings = ["judge.protocol=refeval", f"compare.evaluators=[{who}]", f"compare.also={models}"]
            align(args, seed, guided, settings)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(guided / "compare", kept)


def finished(args: argparse.Namespace, seed: int, judge: str = "other") -> bool:
    """Whether this seed's models were compared by that judge."""
    return (args.out / f"seed-{seed}/compare-{judge}/results.json").is_file()


def align(args: argparse.Namespace, seed: int, folder: Path, changes: list[str]) -> None:
    """`rlme align align-smollm2` with these changes."""
    data = [f"data.train={args.out / 'train.jsonl'}", f"data.eval={args.out / 'held_out.jsonl'}", "data.prompt=prompt"]
    changes = [*data, *SIZES, f"seed={seed}", *args.set, *changes]
    print(f"rlme align align-smollm2 -o {folder} " + " ".join(f"--set '{c}'" for c in changes), flush=True)
    config = validate(AlignConfig, apply_overrides(read_yaml(RECIPE), changes) | {"output": str(folder)}, "align_table")
    started = time.process_time()
    Alignment(config, Console(width=180)).run()
    with (args.out / "seconds.txt").open("a", encoding="utf-8") as file:
        file.write(f"{time.process_time() - started:.1f}\n")


NAMES = {
    "base": "base",
    "sft": "SFT",
    "dpo-free": "DPO reference-free",
    "dpo": "DPO reference-guided",
    "dpo-other": "DPO guided, judged by the larger model",
}


def make_page(args: argparse.Namespace, seeds: list[int]) -> str:
    """The page: what the stages did, and the win rates over all seeds by each judge."""
    sizes = {name: len(read_lines(args.out / f"{name}.jsonl")) for name in ("train", "held_out")}
    minutes = sum(map(float, (args.out / "seconds.txt").read_text().split())) / 60
    parts = [
        "# SmolLM2-135M aligned, and what it came to\n",
        f"Made by `python benchmarks/align_table.py MTBENCH {Path(args.judge).name} OUT --seeds "
        f"{' '.join(map(str, seeds))}`: {sizes['train']} prompts to train on, {sizes['held_out']} held out, "
        f"{', '.join(f'`{c}`' for c in SIZES)}, the rest as in the recipe `align-smollm2`. rlme {version('rlme')}, "
        f"torch {version('torch')}, trl {version('trl')}, {platform.machine()}, "
        f"{minutes:.0f} minutes of one core.\n",
        "## What the stages did\n",
        stage_table(args, seeds),
    ]
    judges = {"self": "SmolLM2-135M after SFT (the self-judge)", "other": Path(args.judge).stem}
    for judge, who in judges.items():
        there = [seed for seed in seeds if finished(args, seed, judge)]
        if there:
            parts += [f"## Win rates judged by {who}, RefEval protocol\n", rate_table(args, there, judge)]
    parts.append(
        "Both presentation orders; ties count half; 95 % bootstrap intervals over prompts, the answers of all seeds to "
        "one prompt drawn together. *At equal length*: see [align.md](align.md#the-final-comparison).\n"
    )
    return "\n".join(parts)


def stage_table(args: argparse.Namespace, seeds: list[int]) -> str:
    """Pairs and DPO of every arm and seed."""
    names = [
        "arm",
        "seed",
        "judge calls",
        "label mass",
        "pairs",
        "no pair",
        "mean margin",
        "chosen / rejected characters",
    ]
    rows = []
    for arm in ("free", "guided", "other"):
        for seed in seeds:
            folder = args.out / f"seed-{seed}" / arm / "round-1"
            judge, pairs, dpo = (read_json(folder / s / "stage.json")["info"] for s in ("judge", "pairs", "dpo"))
            skipped = ", ".join(f"{n} {why}" for why, n in pairs["skipped"].items()) or "0"
            row = [NAMES["dpo" if arm == "guided" else f"dpo-{arm}"], str(seed), str(judge["calls"])]
            row += [f"{judge['label_mass']:.2f}", str(pairs["pairs"]), skipped, f"{pairs['mean_margin']:.3f}"]
            row += [f"{pairs['chosen_chars']:.0f} / {pairs['rejected_chars']:.0f}"]
            rows.append([*row, f"{dpo['first_loss']:.3f} to {dpo['last_loss']:.3f}"])
    return table([*names, "DPO loss"], rows)


def rate_table(args: argparse.Namespace, seeds: list[int], judge: str) -> str:
    """Every two models over all seeds, with each seed's win rate beside."""
    by_seed = [matches(args.out / f"seed-{seed}/compare-{judge}/matches.jsonl") for seed in seeds]
    pooled = winrates.table([m for part in by_seed for m in part], list(NAMES), resamples=1000, seed=0)
    single = [winrates.table(part, list(NAMES), resamples=0, seed=0) for part in by_seed]
    rows = []
    for i, row in enumerate(pooled):
        shown = row | {"model": NAMES[row["model"]], "against": NAMES[row["against"]]}
        each = " ".join(f"{100 * part[i]['win_rate']['value']:.0f}" for part in single)
        rows.append([*winrates.cells(shown), each])
    return table([*winrates.columns(), "win rate by seed"], rows)


def matches(path: Path) -> list[winrates.Match]:
    """One seed's comparisons, with the models in the order of NAMES."""
    found = []
    order = list(NAMES)
    for row in read_lines(path):
        match = winrates.Match(**(row | {"lengths": tuple(row["lengths"])}))
        if order.index(match.a) > order.index(match.b):
            given, swapped = (None if p is None else 1 - p for p in (match.given, match.swapped))
            match = winrates.Match(match.prompt, match.b, match.a, given, swapped, match.lengths[::-1])
        found.append(match)
    return found


def table(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSONL."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

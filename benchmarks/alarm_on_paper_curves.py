"""The alarm rule on the accuracy and reward curves of the RLME paper (arXiv 2601.21268, Figures 2 to 6).

    python benchmarks/alarm_on_paper_curves.py CURVES.json [--seeds 200] [--json FILE]

CURVES.json maps figure -> run -> {x, y}: curves decoded from the paper's plots (accuracy of the training
batches, smoothed with an exponential average of decay 0.9, as plotted). A held-out measurement on `--prompts`
prompts every `--every` steps is simulated as a binomial draw around such a curve; the reward of a step is the
plotted reward with the smoothing undone, the accuracy itself for RLVR (its reward), and an ever-rising
number where the paper plots no reward (the hardest case for staying silent). Two made-up runs are added:
accuracy that stays at .92 or at .5 for 467 steps under an ever-rising reward. Prints a Markdown table;
docs/monitors.md carries it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np

from rlme.training.monitors import GOLD, Alarm

COLLAPSE = ("fig5 RLME", "fig5 RLME-Crowd")
HEALTHY = ("fig5 RLVR", "fig5 RLME-10GT", "fig2 RLVR", "fig2 RLME", "constant 0.92", "constant 0.5")
Curve = np.ndarray


def unsmoothed(curve: Curve) -> Curve:
    """Undo y_t = 0.9 y_{t-1} + 0.1 x_t."""
    raw = curve.copy()
    raw[1:] = (curve[1:] - 0.9 * curve[:-1]) / 0.1
    return raw


def centred(curve: Curve, half: int = 10) -> Curve:
    """Mean of the un-smoothed curve over 2 * half + 1 steps around each step: no lag, little batch noise."""
    raw = unsmoothed(curve)
    return np.array([raw[max(0, t - half) : t + half + 1].mean().clip(0, 1) for t in range(len(raw))])


def load(path: Path) -> dict[str, tuple[Curve, Curve]]:
    """run name -> (accuracy as plotted, reward of each step)."""
    figures = json.loads(path.read_text())
    rewards = {
        run: unsmoothed(np.array(curve["y"]))
        for name, figure in figures.items()
        if name.startswith("fig5 reward")
        for run, curve in figure.items()
    }
    runs = {}
    for name, figure in figures.items():
        if not name.startswith(("fig2", "fig3", "fig4", "fig5 accuracy", "fig6 accuracy")):
            continue
        for run, curve in figure.items():
            accuracy = np.array(curve["y"])
            if run == "RLVR":
                reward = unsmoothed(accuracy)
            elif name.startswith("fig5"):
                reward = rewards[run]
            else:
                reward = np.arange(len(accuracy), dtype=float)
            runs[f"{name[:4]} {run}"] = (accuracy, reward)
    for level in (0.92, 0.5):
        runs[f"constant {level:g}"] = (np.full(467, level), np.arange(467.0))
    return runs


def first_alarm(truth: Curve, reward: Curve, *, prompts: int, every: int, seed: int) -> int | None:
    """Step of the first alarm of one simulated run, None for silence."""
    rng = np.random.default_rng(seed)
    alarm = Alarm(prompts=prompts)
    for step in range(1, len(truth) + 1):
        heldout = {GOLD: rng.binomial(prompts, truth[step - 1]) / prompts} if step % every == 0 else {}
        if alarm.update(step, float(reward[step - 1]), heldout):
            return step
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between held-out measurements")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    runs = load(args.curves)
    rows = []
    for name, (plotted, reward) in runs.items():
        truths = {"as plotted": plotted, "without the plot's lag": centred(plotted)}
        if name.startswith("constant"):
            truths = {"exact": plotted}
        for truth_name, truth in truths.items():
            alarms = [
                first_alarm(truth, reward, prompts=args.prompts, every=args.every, seed=seed)
                for seed in range(args.seeds)
            ]
            fired = sorted(step for step in alarms if step is not None)
            row = {"run": name, "accuracy": truth_name, "alarm": len(fired) / args.seeds}
            if fired:
                row |= {"median": median(fired), "first": fired[0], "last": fired[-1]}
            if name in COLLAPSE:
                below = next(t + 1 for t in range(60, len(truth)) if truth[t] < 0.8)
                row |= {
                    "below_0.8": below,
                    "before": sum(step < below for step in fired) / args.seeds,
                    "delay": median(fired) - below,
                }
            rows.append(row)
    rows.sort(key=lambda row: (row["run"] not in COLLAPSE, row["run"] not in HEALTHY))
    print(f"{args.seeds} seeds, held-out accuracy on {args.prompts} prompts every {args.every} steps\n")
    print("| run | accuracy | expected | alarm in | median step (range) | below .8 at | alarm before |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        name = row["run"]
        expected = "alarm" if name in COLLAPSE else "silence" if name in HEALTHY else ""
        when = f"{row['median']:g} ({row['first']}-{row['last']})" if "median" in row else ""
        before = f"{row['before']:.1%}" if "before" in row else ""
        print(
            f"| {name} | {row['accuracy']} | {expected} | {row['alarm']:.1%} | {when} "
            f"| {row.get('below_0.8', '')} | {before} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

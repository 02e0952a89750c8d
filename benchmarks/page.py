"""BENCHMARKS.md as text: the tables of what `run.py` has measured, and what they say."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from workloads import BEST, GPU, KEPT, SIDES, UNCOUNTED, WORKLOADS, sides_of

from rlme.models import BUILTIN

STAGES = ("sample", "judge", "update", "step")
# The project's targets on w1 and two processor cores: TRL's seconds over ours.
BARS = {"sample": 1.5, "judge": 6.0, "update": 3.0, "step": 3.5}
FLOOR = ("matrix products", "attention")  # kinds of operation in a profile that no better kernel does without
NAMES = {"sample": "sampling", "judge": "judging", "update": "loss and update", "step": "whole step"}


def stage_table(summary: dict[str, Any], sides: tuple[str, ...]) -> str:
    """Markdown: one line a stage."""
    others = [side for side in sides if side != "ours"]
    head = ["stage", *(f"{SIDES[s]} s" for s in sides), *(f"{SIDES[s]} / ours" for s in others)]
    head += [*(f"{SIDES[s]} tokens" for s in sides), *(f"{SIDES[s]} % of matrix rate" for s in sides)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for stage, row in summary["stages"].items():
        cells = [NAMES[stage], *(f"{row[f'{s}_s']:.3g}" for s in sides), *(f"{row[f'{s}_ratio']:.2f}" for s in others)]
        for s in sides:
            cells.append("" if stage == "step" else f"{row[f'{s}_tokens']:,.0f}")
        for s in sides:
            cells.append("" if stage == "step" else f"{100 * row[f'{s}_rate']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    peak = ", ".join(f"{SIDES[s]} {summary['peak_gib'][s]:.1f} GiB" for s in sides)
    return "\n".join(lines) + f"\n\nPeak memory of the {'GPU' if summary['gpu'] else 'process'}: {peak}.\n"


def bounds(summary: dict[str, Any], profiles: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Seconds of each stage on our side: of its products and attention alone, and of the layers' products alone at the
    whole matrix rate."""
    needed, least = Counter[str](), Counter[str]()
    for stage, shares in profiles.items():
        row = summary["stages"][stage]
        needed[stage] = row["ours_s"] * sum(shares.get(kind, 0.0) for kind in FLOOR)
        least[stage] = row["ours_s"] * row["ours_rate"]
    needed["step"], least["step"] = needed.total(), least.total()
    return needed, least


def target_table(summary: dict[str, Any], profiles: dict[str, Any]) -> str:
    """Markdown: targets, what was measured, and two bounds on what could be."""
    peers = sides_of("w1", alone=False)[1:]
    head = ["stage", "target", "measured", *(f"against {SIDES[side]}" for side in peers[1:])]
    head += ["with nothing but products and attention", "most that the tokens allow"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    bounded = bounds(summary, profiles)
    for stage in STAGES:
        row = summary["stages"][stage]
        cells = [NAMES[stage], str(BARS[stage]), *(f"{row[f'{side}_ratio']:.2f}" for side in peers)]
        cells += [f"{row['peer_s'] / bound[stage]:.1f}" for bound in bounded]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def missed(summary: dict[str, Any], profiles: dict[str, Any]) -> str:
    """Markdown: each target that was not reached, and what stands in the way."""
    needed, _ = bounds(summary, profiles)
    lines = []
    peak = summary["peak_gib"]
    for side in sides_of("w1", alone=False)[1:]:
        for stage in STAGES:
            row, bar = summary["stages"][stage], BARS[stage]
            if (ratio := row[f"{side}_ratio"]) >= bar:
                continue
            most = row[f"{side}_s"] / needed[stage]
            if most < bar:
                verdict = "out of reach"
            else:
                verdict = f"{1 - needed[stage] / row['ours_s']:.0%} of our time is other operations"
            lines.append(
                f"- {NAMES[stage]}, against *{SIDES[side]}*: {ratio:.2f} of {bar}; products and attention alone would "
                f"give {most:.1f} ({verdict})."
            )
        if peak["ours"] > peak[side]:
            lines.append(f"- peak memory, against *{SIDES[side]}*: {peak['ours']:.1f} GiB to {peak[side]:.1f}.")
    return "Not reached:\n\n" + "\n".join(lines) if lines else "All targets are reached."


def ratio_table(results: dict[str, dict[str, Any]], other: str) -> str:
    """Markdown: one line a workload that `other` ran, its seconds over ours."""
    name = SIDES[other]
    head = ["workload", *(NAMES[s] for s in STAGES), "ours, s a step", f"{name}, s a step"]
    head.append(f"peak ours / {name}, GiB")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for workload, summary in results.items():
        stages, peak = summary["stages"], summary["peak_gib"]
        if other in peak:
            cells = [workload, *(f"{stages[s][f'{other}_ratio']:.2f}" for s in STAGES)]
            cells += [f"{stages['step'][f'{side}_s']:.3g}" for side in ("ours", other)]
            lines.append("| " + " | ".join([*cells, f"{peak['ours']:.1f} / {peak[other]:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def question_table(questions: dict[str, dict[str, Any]]) -> str:
    """Markdown: what judging takes with more questions about the same completions."""
    head = ["questions", "judging, s", "tokens", "each after the first adds", "in tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for count, row in questions.items():
        added = ["" if row[of] is None else f"{100 * row[of]:.1f} %" for of in ("added", "added_tokens")]
        lines.append("| " + " | ".join([count, f"{row['seconds']:.3g}", f"{row['tokens']:,}", *added]) + " |")
    return "\n".join(lines) + "\n"


def on_a_cpu(w1: dict[str, Any]) -> str:
    """What has to be said of the sides of w1 where the C library's heap and two cores count."""
    step = w1["stages"]["step"]
    saved = 1 - step["peer_kept_s"] / step["peer_s"]
    share = f"{saved:.0%} of *TRL*'s step" if saved > 0 else "nothing that shows in *TRL*'s step here"
    return f"""*TRL, {BEST} rows* trains with
`per_device_train_batch_size={BEST}`: of 1, 2, 4, 8, 16 and 32 rows (`benchmarks/side.py --side peer:N --workload w1`)
the fastest update on two cores, and with little memory. Our training passes hold at most
{WORKLOADS["w1"].token_budget:,} tokens.

On Linux, the C library gives the memory of freed tensors back to the system and asks for it again, which is
{share}; our trainer tells it not to (`rlme.memory`).
*TRL, memory kept* is TRL with its defaults and the same settings given from outside, by environment variables
({", ".join(f"`{k}={v}`" for k, v in KEPT.items())}): what its user can have who knows of them."""


def what_is_left(profiles: dict[str, Any], further: dict[str, Any]) -> str:
    """What a further question costs, and where the time of each stage goes."""
    kinds = list(dict.fromkeys(kind for shares in profiles.values() for kind in shares))
    profile = ["| stage | " + " | ".join(kinds) + " |", "|" + "---|" * (1 + len(kinds))]
    for stage, shares in profiles.items():
        profile.append(f"| {NAMES[stage]} | " + " | ".join(f"{100 * shares.get(k, 0):.0f} %" for k in kinds) + " |")
    return f"""## A further question

w1's completions judged with more and more questions, in turns in one process (`benchmarks/further_question.py`; medians
of {further["rounds"]} rounds). The target: a further question adds at most 10 % to the time of the first.

{question_table(further["questions"])}
## What is left

Share of each stage's time on our side, by kind of operation (torch profiler):

{chr(10).join(profile)}

Matrix products and attention are the floor of this computation at these token counts; the rest is what better kernels
could still remove.

"""


def document(
    results: dict[str, dict[str, Any]],
    profiles: dict[str, Any],
    further: dict[str, Any],
    setting: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """BENCHMARKS.md."""
    w1 = results["w1"]
    targets = ""
    chosen = f" --workload {' '.join(options.workload)} --out FILE" if options.workload else ""
    if options.model != BUILTIN:
        chosen = f" --model DIR{chosen}"
    left = what_is_left(profiles, further)
    if not GPU:  # the targets are two cores'
        targets = f"""{target_table(w1, profiles)}
The two last columns are bounds. *Nothing but products and attention*: ours without the other kinds of operation in the
table below. Where the target lies above it, only fewer tokens or faster products than PyTorch's could reach it. *Most
that the tokens allow*: the layers' products alone, at the whole measured matrix rate.

{missed(w1, profiles)}

"""
    clock = "wall clock" if options.clock == "wall" else "processor time of the process"
    judged = w1["stages"]["judge"]
    workloads = "\n".join(
        f"- `{name}`: {w.prompts} prompts of {w.prompt_tokens or 'about 90'} tokens, {w.group} completions of at most "
        f"{w.completion_tokens} tokens each, {w.questions} questions to "
        f"{'the policy itself' if w.live else f'{w.evaluators} frozen copies'}"
        for name, w in WORKLOADS.items()
        if name in results
    )
    if w1["precision"] == "bfloat16":
        precision = "float32 weights, bfloat16 autocast, evaluators in bfloat16"
    else:
        precision = "float32, as the machine has no bfloat16 products in hardware"
    if GPU:
        own = f"""*TRL, {BEST} rows* trains with
`per_device_train_batch_size={BEST}`: all rows in one pass, as a GPU wants it. Ours are in one pass, too."""
    else:
        own = on_a_cpu(w1)
    starved = [
        f"{SIDES[side]} on {name}"
        for name, summary in results.items()
        for side in sides_of(name, alone=False)
        if side not in summary["peak_gib"]
    ]
    missing = f"Not measured: {', '.join(starved)}, which need more memory than there is.\n\n" if starved else ""
    in_full = "\n".join(
        f"### {name}\n\n{stage_table(summary, tuple(summary['peak_gib']))}"
        for name, summary in results.items()
        if name != "w1"
    )
    rest = (
        f"""## Other workloads: TRL's time over ours

{ratio_table(results, "peer")}
{workloads}

A group of one is not among them: it has no advantage, and TRL refuses it.

{missing}## The same with sharing off: its time over ours

{ratio_table(results, "off")}
## Other workloads in full

{in_full}"""
        if len(results) > 1
        else workloads + "\n"
    )
    return f"""# Benchmarks

Written by `python benchmarks/run.py{chosen}`; do not edit.
Machine: {", ".join(filter(None, (w1["gpu"], setting["machine"])))}; {setting["packages"]};
model {Path(options.model).name}; {clock}, {options.threads or "all"} threads;
medians of {options.repeats} x {options.steps} steps (w1; one step of the others), sides in turns; steps at the start
that are not counted: {UNCOUNTED}. Matrix products in {w1["precision"]} were measured at
{w1["matmul_gflops"]:,.0f} GFLOP/s.

*Ours* is `RLMETrainer`. *TRL* is `GRPOTrainer` with a reward function as a careful user writes it: batched by length,
logits of the label positions only, no gradient checkpointing, TRL's default of 8 rows a training pass. *Sharing off* is
`RLMETrainer(share_prefixes=False)`. Model, prompts, questions, loss, optimizer and precision are the same:
{precision}. *Tokens* are positions that went through a model, padding included. *Matrix rate* is the share of the
measured matrix-product rate that the transformer layers' arithmetic alone accounts for.

## One training step (w1)

{stage_table(w1, sides_of("w1", alone=False))}
*TRL* runs as it is installed, with its defaults. {own}

{targets}In judging, each answer is read
once, but every question's own words (and its label's) are new: {judged["ours_tokens"]:,.0f} tokens instead
of {judged["peer_tokens"]:,.0f}.

{left}{rest}"""

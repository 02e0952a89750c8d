"""RLME against TRL, and against itself without sharing, on the same training steps.

    python benchmarks/run.py                                regenerates BENCHMARKS.md (a long run)
    python benchmarks/run.py --workload w1 --json FILE      one workload: seconds of ours, of the peer, ratio
    python benchmarks/random_model.py qwen3-4b DIR          a model for GPUs, then:
    python benchmarks/run.py --model DIR --workload w1 prompt-1024 --out FILE

The sides run one after another in turns, so that a machine that slows down slows all; on a CPU in processes of their
own, as their memory can be told apart only so. Ratios are medians over pairs of steps. Run it on a machine that does
nothing else. Workloads that are done are kept in FILE.part beside the page until it is written: the same command goes
on there, and measures what was cut short anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from workloads import GPU, UNCOUNTED, WORKLOADS

from rlme.folders import replace_file
from rlme.models import fast_bfloat16
from rlme.progress import SlowProgress

HERE = Path(__file__).resolve().parent
BUILTIN = "builtin:smollm2-135m"
STAGES = ("sample", "judge", "update", "step")
# The project's targets on w1 and two processor cores: TRL's seconds over ours.
BARS = {"sample": 1.5, "judge": 6.0, "update": 3.0, "step": 3.5}
# What `rlme.memory.keep_freed_memory` sets, as its user would have to give it to another program.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1)}
SPARE = 2**30  # bytes of memory that a side has to leave to the machine
# Rows of a training pass on w1: all, as a GPU wants it; on two cores, of 1, 2, 4, 8, 16 and 32, TRL's fastest update.
BEST = 32 if GPU else 2
SIDES = {
    "ours": "ours",
    "peer": "TRL",
    "peer_best": f"TRL, {BEST} rows",
    "peer_kept": "TRL, memory kept",
    "off": "sharing off",
}
FLOOR = ("matrix products", "attention")  # kinds of operation in a profile that no better kernel does without
NAMES = {"sample": "sampling", "judge": "judging", "update": "loss and update", "step": "whole step"}


def run_sides(
    sides: Sequence[str], workload: str, steps: int, options: argparse.Namespace, *extra: str
) -> list[dict[str, Any]]:
    """One process of `side.py`."""
    names = [f"peer:{BEST}" if side == "peer_best" else side.partition("_")[0] for side in sides]
    arguments = ["--side", *names, "--workload", workload, "--steps", str(steps), *extra]
    return run_script("side.py", arguments, options, KEPT if sides[0] == "peer_kept" else {})


def run_script(
    name: str, arguments: list[str], options: argparse.Namespace, settings: dict[str, str]
) -> list[dict[str, Any]]:
    """A script of this folder in a process of its own; the numbers that it prints."""
    command = [sys.executable, str(HERE / name), "--model", options.model, "--clock", options.clock, *arguments]
    environment = dict(os.environ) | settings
    if options.threads:
        command += ["--threads", str(options.threads)]
        environment["OMP_NUM_THREADS"] = str(options.threads)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    starved = False
    while True:
        try:
            output, errors = process.communicate(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if psutil.virtual_memory().available < SPARE:
                starved = True
                process.kill()  # before the system does, which may choose another process
    if starved or "OutOfMemoryError" in errors:
        raise MemoryError(f"{' '.join(command)} needs more memory than there is")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"')]  # TRL logs with other quotes


class Finished:
    """What a long run has measured so far, in a file, for one that goes on after it was killed."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, Any] = {"settings": settings}
        if path and path.exists() and (known := json.loads(path.read_text()))["settings"] == settings:
            self.known = known

    def measured(self, what: str, measure: Callable[[], Any]) -> Any:
        """The numbers of this name: those in the file, or else new ones, which it then holds."""
        if what not in self.known:
            self.known[what] = measure()
            if self.path:
                replace_file(self.path, json.dumps(self.known))
        return self.known[what]

    def forget(self) -> None:
        """The file is not needed any more."""
        if self.path:
            self.path.unlink(missing_ok=True)


def sides_of(name: str, *, alone: bool) -> tuple[str, ...]:
    """Who runs a workload; `alone`: without a page."""
    if alone:
        return ("ours", "peer", "peer_best") if name == "w1" else ("ours", "peer")
    if name == "w1":
        return ("ours", "peer", "peer_best", "off" if GPU else "peer_kept")  # GPUs have no C library's heap
    return ("ours", "peer", "off")


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of a workload: per stage seconds, tokens and share of the matrix rate of each side, and paired ratios."""
    steps = {side: [step for run in results for step in run["steps"]] for side, results in runs.items()}
    rate = max(run["matmul_gflops"] for results in runs.values() for run in results) * 1e9
    first = next(iter(runs.values()))[0]
    summary: dict[str, Any] = {"stages": {}, "peak_gib": {}, "matmul_gflops": rate / 1e9, "gpu": first["gpu"]}
    summary["precision"] = first["precision"]
    for stage in STAGES:
        row: dict[str, Any] = {}
        for side, measured in steps.items():
            seconds = statistics.median(step["seconds"][stage] for step in measured)
            row[f"{side}_s"] = seconds
            if stage != "step":
                tokens = statistics.median(step["tokens"].get(stage, 0) for step in measured)
                # Forward: 2 operations per weight and token; with backward: 6. The LM head is left out.
                row[f"{side}_tokens"] = tokens
                operations = (6 if stage == "update" else 2) * first["body_weights"]
                row[f"{side}_rate"] = operations * tokens / seconds / rate
        for other in steps.keys() - {"ours"}:
            pairs = zip(steps[other], steps["ours"], strict=False)
            row[f"{other}_ratio"] = statistics.median(a["seconds"][stage] / b["seconds"][stage] for a, b in pairs)
        summary["stages"][stage] = row
    memory = "peak_gpu_gib" if summary["gpu"] else "peak_gib"
    for side, results in runs.items():
        summary["peak_gib"][side] = max(run[memory] for run in results)
    return summary


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


def target_table(summary: dict[str, Any], profiles: dict[str, Any]) -> str:
    """Markdown: targets, what was measured, and two bounds on what could be."""
    peers = sides_of("w1", alone=False)[1:]
    head = ["stage", "target", "measured", *(f"against {SIDES[side]}" for side in peers[1:])]
    head += ["with nothing but products and attention", "most that the tokens allow"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    needed, least = Counter[str](), Counter[str]()  # seconds
    for stage in STAGES:
        row = summary["stages"][stage]
        if stage in profiles:
            needed[stage] = row["ours_s"] * sum(profiles[stage].get(kind, 0.0) for kind in FLOOR)
            least[stage] = row["ours_s"] * row["ours_rate"]  # the same products at the whole matrix rate
        else:
            needed[stage], least[stage] = needed.total(), least.total()
        cells = [NAMES[stage], str(BARS[stage]), *(f"{row[f'{side}_ratio']:.2f}" for side in peers)]
        cells += [f"{row['peer_s'] / bound[stage]:.1f}" for bound in (needed, least)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def machine() -> dict[str, str]:
    """What numbers of one page have in common."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl"))
    digest = hashlib.sha256()
    for file in (*sorted((HERE.parent / "src").rglob("*.py")), *sorted(HERE.glob("*.py"))):
        digest.update(file.read_bytes())
    return {
        "code": digest.hexdigest(),
        "machine": f"{processor()}, {os.cpu_count()} cores{'' if fast_bfloat16() else ' (without bfloat16)'}",
        "packages": packages,
    }


def on_a_cpu(w1: dict[str, Any]) -> str:
    """What has to be said of the sides of w1 where the C library's heap and two cores count."""
    step = w1["stages"]["step"]
    return f"""*TRL, {BEST} rows* trains with
`per_device_train_batch_size={BEST}`: of 1, 2, 4, 8, 16 and 32 rows (`benchmarks/side.py --side peer:N --workload w1`)
the fastest update on two cores, and with little memory. Our training passes hold at most
{WORKLOADS["w1"].token_budget:,} tokens.

On Linux, the C library gives the memory of freed tensors back to the system and asks for it again, which is
{100 * (1 - step["peer_kept_s"] / step["peer_s"]):.0f} % of *TRL*'s step; our trainer tells it not to (`rlme.memory`).
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
    bounds = ""
    chosen = f" --workload {' '.join(options.workload)} --out FILE" if options.workload else ""
    if options.model != BUILTIN:
        chosen = f" --model DIR{chosen}"
    left = what_is_left(profiles, further)
    if not GPU:  # the targets are two cores'
        bounds = f"""{target_table(w1, profiles)}
The two last columns are bounds. *Nothing but products and attention*: ours without the other kinds of operation in the
table below. Where the target lies above it, only fewer tokens or faster products than PyTorch's could reach it. *Most
that the tokens allow*: the layers' products alone, at the whole measured matrix rate. """
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

{bounds}In judging, each answer is read
once, but every question's own words (and its label's) are new: {judged["ours_tokens"]:,.0f} tokens instead
of {judged["peer_tokens"]:,.0f}.

{left}{rest}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), help="these alone; a page only with --out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page, instead of BENCHMARKS.md")
    parser.add_argument(
        "--steps", type=int, default=2, help=f"measured steps of each process on w1; {UNCOUNTED} more run first"
    )
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that is shared")
    options = parser.parse_args()
    chosen = options.workload or list(WORKLOADS)
    alone = bool(options.workload) and options.out is None
    if "w1" not in chosen and not alone:
        parser.error("a page begins with w1: name it among the workloads")
    page = options.out or HERE.parent / "BENCHMARKS.md"
    console = Console(stderr=True)
    results: dict[str, dict[str, Any]] = {}
    profiles: dict[str, Any] = {}
    further: dict[str, Any] = {}
    rounds = [  # w1 again at the end: a slow quarter of an hour of the machine should not hit all its repeats
        (repeat, name) for repeat in range(options.repeats) for name in chosen if repeat == 0 or name == "w1" or alone
    ]
    part = page.with_name(page.name + ".part")
    finished = Finished(None if alone else part, vars(options) | {"json": None, "out": None} | machine())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with SlowProgress(*columns, TimeRemainingColumn(), console=console) as progress:
        total = sum(len(sides_of(name, alone=alone)) for _, name in rounds)
        task = progress.add_task("", total=total + ("w1" in chosen) + 3 * (not alone))

        def take_turns(name: str) -> dict[str, Any]:
            """One run of each side; None for one that needs more memory than there is."""
            results: dict[str, Any] = {}
            sides = sides_of(name, alone=alone)
            for together in [sides] if GPU else [(side,) for side in sides]:
                progress.update(task, description=f"{name}: {', '.join(together)}")
                try:
                    done = run_sides(together, name, options.steps if name == "w1" else 1, options)
                except MemoryError as error:
                    if "ours" in together or name == "w1":  # what everything is compared with
                        raise SystemExit(str(error)) from None
                    results |= dict.fromkeys(together)
                    continue
                finally:
                    progress.advance(task, len(together))
                for side, measured in zip(together, done, strict=True):
                    results[side] = measured
                    seconds = (
                        {stage: round(s, 2) for stage, s in step["seconds"].items()} for step in measured["steps"]
                    )
                    progress.print(f"{name}, {SIDES[side]}:", *seconds)
            return results

        runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for repeat, name in rounds:
            for side, done in finished.measured(f"{name} {repeat}", partial(take_turns, name)).items():
                runs.setdefault(name, {}).setdefault(side, []).append(done)
            progress.update(task, completed=sum(len(of_side) for sides in runs.values() for of_side in sides.values()))
        results = {
            name: summarise({side: done for side, done in sides.items() if None not in done})
            for name, sides in runs.items()
        }
        if "w1" in chosen:
            progress.update(task, description="a further question")
            further = finished.measured("further", lambda: run_script("further_question.py", [], options, {})[-1])
            progress.advance(task)
        for stage in () if alone else STAGES[:3]:
            progress.update(task, description=f"profile: {stage}")
            profiled = finished.measured(stage, partial(run_sides, ["ours"], "w1", 1, options, "--profile", stage))
            profiles[stage] = profiled[-1]["profile"]
            progress.advance(task)
    if options.json:
        measured = {"workloads": results, "further_question": further, "profiles": profiles}
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    if alone:
        for name in chosen:
            print(stage_table(results[name], tuple(results[name]["peak_gib"])))
        if further:
            print(question_table(further["questions"]))
    else:
        page.write_text(document(results, profiles, further, finished.known["settings"], options))
        finished.forget()
        print(f"wrote {page}")


if __name__ == "__main__":
    main()

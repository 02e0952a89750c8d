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
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from page import STAGES, document, question_table, stage_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from workloads import BEST, GPU, KEPT, SIDES, UNCOUNTED, WORKLOADS, sides_of

from rlme.folders import replace_file
from rlme.models import BUILTIN, fast_bfloat16
from rlme.progress import SlowProgress

HERE = Path(__file__).resolve().parent
SPARE = 2**30  # bytes of memory that a side has to leave to the machine


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

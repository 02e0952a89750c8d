"""`rlme lab build`: the shipped models from nothing but this package; `rlme lab gates`: what they can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlme.errors import InputError
from rlme.lab.corpus import Drills, Mixture
from rlme.lab.pretrain import CLOSER, Plan, Stage

BASE = Plan()
JUDGING = Stage(1500, replace(CLOSER.mixture, judging_only=0.9), peak=0.5, level=0.0)
DRILLS = Drills(0.8, ("invented", "same", *["against"] * 3), claims=0.15)
READING = (
    Stage(2500, Mixture(hinted=0.25)),
    replace(CLOSER, mixture=replace(CLOSER.mixture, hinted=0.25)),
    replace(CLOSER, mixture=replace(CLOSER.mixture, hinted=0.25, judging_only=0.7)),
)
PLANS: dict[str, Plan] = {
    "lab": BASE,
    "lab-judge": replace(BASE, stages=(*BASE.stages, JUDGING)),
    "lab-weak": replace(BASE, seed=3, stages=(Stage(1050),)),
    "lab-reader": replace(BASE, stages=READING, drill_steps=600, drilled=DRILLS),
    "lab-small": replace(BASE, hidden=48, heads=3, stages=(Stage(2500),)),
    "lab-large": replace(BASE, hidden=128, layers=4, stages=(Stage(2500),)),
}
"""The base model; the base model taught judging for longer; one whose training ended early; one drilled to read what a
text says against what it was taught; two generators of other sizes."""


def build_models(out: Path, console: Console) -> None:
    """Train every model and save it, with its gates, in a folder of its own; what is there stays."""
    import torch

    from rlme.lab.gates import measure
    from rlme.lab.pretrain import pretrain
    from rlme.lab.tokenizer import build_tokenizer

    torch.set_num_threads(1)  # sums in another order give other weights
    for name, plan in PLANS.items():
        folder = out / name
        if folder.is_dir():
            console.print(f"{folder}: there already", markup=False, highlight=False)
            continue
        console.print(f"{name}: {sum(stage.steps for stage in plan.stages)} steps", markup=False, highlight=False)
        model = pretrain(plan, lambda line: console.print(line, markup=False, highlight=False))
        tokenizer = build_tokenizer()
        numbers = measure(model.to(torch.bfloat16).to(torch.float32), tokenizer)  # as it is shipped
        partial = out / f"{name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "gates.json").write_text(json.dumps({k: round(v, 4) for k, v in numbers.items()}, indent=1) + "\n")
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.replace(folder)
    console.print(f"models: {out}", markup=False, highlight=False)


def show_gates(console: Console) -> None:
    """Measure the shipped models."""
    import torch

    from rlme.lab.gates import GATES, measure
    from rlme.models import load_model, load_tokenizer

    torch.set_num_threads(1)
    shown = Table(title="lab models, measured on their own samples", title_justify="left")
    columns: dict[str, dict[str, float]] = {}
    for name in PLANS:
        try:
            model, tokenizer = load_model(f"builtin:{name}"), load_tokenizer(f"builtin:{name}")
        except InputError as error:
            console.print(str(error), markup=False, highlight=False)
            continue
        columns[name] = measure(model, tokenizer)
    shown.add_column("")
    for name in columns:
        shown.add_column(name, justify="right")
    shown.add_column("gate of lab")
    for key in next(iter(columns.values()), {}):
        low, high = GATES.get(key, (None, None))
        gate = "" if low is None else f"{low:g} to {high:g}"
        shown.add_row(key, *(f"{numbers[key]:.3f}" for numbers in columns.values()), gate)
    console.print(shown)

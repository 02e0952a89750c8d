"""Running the lab's experiments: one ordinary run folder per arm and seed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlme.config import Config
from rlme.config_file import read_yaml, validate
from rlme.errors import InputError
from rlme.lab.data import write_data
from rlme.lab.experiments import ALIASES, EXPERIMENTS, Arm, Experiment, configuration
from rlme.templating import nearest


def find(name: str) -> list[Experiment]:
    """The experiment of that name; `all` of them."""
    if name == "all":
        return list(EXPERIMENTS.values())
    name = ALIASES.get(name, name)
    if name not in EXPERIMENTS:
        known = [*EXPERIMENTS, *ALIASES, "all", "report", "build", "gates"]
        raise InputError(f"the lab has no experiment {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return [EXPERIMENTS[name]]


def run_folder(out: Path, experiment: Experiment, arm: Arm, seed: int) -> Path:
    """Where the run of an arm and seed lies."""
    return out / experiment.name / f"{arm.label}-seed{seed}"


def run_experiments(
    experiments: Sequence[Experiment],
    out: Path,
    *,
    seeds: int,
    steps: int | None,
    arms: Sequence[str],
    console: Console,
) -> None:
    """Run what is not there yet. Seeds go outside, so that an interrupted night has whole seeds to show."""
    import torch

    torch.set_num_threads(1)  # more are no faster for models this small, and on a busy machine many times slower
    unknown = set(arms) - {arm.label for e in experiments for arm in e.arms}
    if unknown:
        known = ", ".join(arm.label for e in experiments for arm in e.arms)
        raise InputError(f"--arm {sorted(unknown)[0]!r} is in none of these experiments; there are: {known}")
    data = out / "data"
    write_data(data)
    for seed in range(seeds):
        for experiment in experiments:
            for arm in experiment.arms:
                if arms and arm.label not in arms:
                    continue
                folder = run_folder(out, experiment, arm, seed)
                content = configuration(experiment, arm, seed, data.resolve(), folder)
                if steps is not None:
                    content["train"]["steps"] = steps
                _run(validate(Config, content, f"{experiment.name}, {arm.label}"), out, console)


def _run(config: Config, out: Path, console: Console) -> None:
    """A run that ended is left alone, whatever its length: a night's work is not for us to delete. One that was
    interrupted goes on where its last checkpoint stands."""
    from rlme.training.run import train
    from rlme.training.run_folder import RunFolder

    folder = RunFolder(config.folder)
    if folder.final.is_dir():
        ran, wanted = read_yaml(folder.config)["train"]["steps"], config.train.steps
        other = "" if ran == wanted else f", with {ran} steps instead of {wanted}: delete it to have it run anew"
        console.print(f"{config.folder}: there already{other}", markup=False, highlight=False, soft_wrap=True)
        return
    same = None if folder.config.is_file() else _same_run(config, out)
    if same is not None:
        console.print(f"{config.folder}: as {same}", markup=False, highlight=False, soft_wrap=True)
        partial = folder.path.with_name(f"{folder.path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(same, partial)
        RunFolder(partial).write_config(read_yaml(partial / "config.yaml") | {"output": config.output})
        partial.replace(folder.path)
        return
    console.print(f"{config.folder}: {config.train.steps} steps", markup=False, highlight=False, soft_wrap=True)
    train(config, console, resume=RunFolder.open(config.folder) if folder.config.is_file() else None)


def _same_run(config: Config, out: Path) -> Path | None:
    """A finished run of this configuration under another figure's name: their control arms are the same."""
    from rlme.training.run_folder import RunFolder

    wanted = config.model_dump(mode="json", exclude={"output"})
    for file in sorted(out.glob("*/*/config.yaml")):
        ran = read_yaml(file)
        whole = RunFolder(file.parent).final.is_dir() and file.parent.suffix != ".partial"
        if whole and all(ran.get(key) == value for key, value in wanted.items()):
            return file.parent
    return None

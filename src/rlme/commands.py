"""What the commands of `rlme.cli` do around the training run: files, tables, words."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlme.config import Config
from rlme.config_file import apply_overrides, beside, read_yaml, validate
from rlme.errors import InputError
from rlme.evaluators.endpoint_config import HOW_IT_IS_CALLED
from rlme.result_files import check_writable


def recipe_files() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(resources.files("rlme") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A file of that name, or the shipped recipe called so."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipe_files()
    if name in shipped:
        return shipped[name]
    if path.suffix or "/" in name:
        raise InputError(f"{name}: no such file; `rlme init {name}` writes a commented starter")
    raise InputError(f"{name!r} is neither a file nor a shipped recipe ({', '.join(shipped)})")


def read_config(name: str, overrides: Sequence[str] = (), output: Path | None = None) -> Config:
    """Read, override and check a configuration. Data and models may be given relative to the configuration's folder."""
    path = find_config(name)
    content = apply_overrides(read_yaml(path), overrides)
    content.pop("run_info", None)  # of a run's own config.yaml
    if output is not None:
        content["output"] = str(output)
    elif "output" not in content:
        content["output"] = f"runs/{path.stem}"
    if "judge" in content and "questions" not in content:
        raise InputError(f"{path} has a `judge` section: it is a file for rlme align, not for rlme train")
    config = validate(Config, content, str(path))
    places = [(config.data, "train"), (config.data, "eval"), (config.model, "path")]
    for section, key in (*places, *((evaluator, "model") for evaluator in config.evaluators)):
        if value := getattr(section, key):
            setattr(section, key, beside(path, value))
    return config


def _quiet() -> None:
    """Warnings of the libraries that are meant for their developers, not for the user of this command."""
    for name in ("transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading weights from disk; downloads keep theirs


def _console() -> Console:
    """Of several processes only the first one speaks."""
    return Console(quiet=os.environ.get("RANK", "0") != "0")


def train_config(name: str, overrides: Sequence[str], output: Path | None, table: Path | None) -> Path:
    """`rlme train CONFIG`."""
    check_writable(table)
    config = read_config(name, overrides, output)
    from rlme.training.run_folder import RunFolder

    RunFolder(config.folder).check_new()  # said before a model is loaded
    _quiet()
    console = _console()
    from rlme.training.run import train

    folder = train(config, console)
    finish(folder.path, console, table)
    return folder.path


# What may change when a run goes on: nothing that would make it another run.
RESUMABLE = (
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.show_every",
    "train.on_alarm",
    "train.token_budget",
    "reward.max_failure_rate",
    *(f"evaluators.N.endpoint.{key}" for key in HOW_IT_IS_CALLED),
)


def resume_run(path: Path, overrides: Sequence[str], table: Path | None) -> None:
    """`rlme train --resume RUN`."""
    check_writable(table)
    from rlme.training.run_folder import RunFolder

    folder = RunFolder.open(path)
    content = read_yaml(folder.config)
    info = content.pop("run_info", {})
    for item in overrides:
        key = re.sub(r"\.\d+\.", ".N.", item.partition("=")[0].strip())
        if key not in RESUMABLE:
            raise InputError(f"--set {item!r}: a run goes on as it was; only {', '.join(RESUMABLE)} can change")
    config = validate(Config, apply_overrides(content, overrides), str(folder.config))
    changed = {**content, "run_info": info} if overrides else None
    _quiet()
    console = _console()
    from rlme.training.run import train

    step, _ = folder.last_checkpoint()
    where = f"after step {step}" if step else "from the start (no checkpoint was written yet)"
    console.print(f"resuming {path} {where}", markup=False, highlight=False)
    finish(train(config, console, resume=folder, changed=changed).path, console, table)


def finish(path: Path, console: Console, table: Path | None) -> None:
    """The last words of a run: first and last values side by side, and where everything is."""
    from rlme.training.run_folder import RunFolder

    records = RunFolder(path).read_lines()
    rows = before_after(records)
    if rows:
        shown = Table(title="from the first to the last steps", title_justify="left")
        for column in ("", "first", "last"):
            shown.add_column(column, justify="left" if not column else "right")
        for row in rows:
            shown.add_row(Text(str(row["metric"])), f"{row['first']:.3f}", f"{row['last']:.3f}")
        console.print(shown)
    if table is not None:
        table.write_text(json.dumps({"run": str(path), "metrics": rows}, indent=2), encoding="utf-8")
    console.print(f"model: {path / 'final'}   metrics: {path / 'metrics.jsonl'}   rollouts: {path / 'rollouts'}")


def before_after(records: Sequence[dict[str, Any]], window: int = 5) -> list[dict[str, Any]]:
    """Means over the first and the last `window` values of what people look at."""
    wanted = ["reward", "reward/judged", "gold/accuracy", "completions/mean_tokens"]
    wanted += ["eval/reward", "eval/reward/judged", "eval/gold/accuracy"]
    keys = wanted + sorted({k for r in records for k in r if k.endswith("/probability")})
    rows = []
    for key in keys:
        values = [r[key] for r in records if key in r]
        n = min(window, len(values) // 2) if not key.startswith("eval/") else min(1, len(values) // 2)
        if n:
            rows.append({"metric": key, "first": sum(values[:n]) / n, "last": sum(values[-n:]) / n})
    return rows


def write_starter(path: Path, recipe: str | None) -> None:
    """`rlme init`."""
    if path.exists():
        raise InputError(f"{path} exists already: choose another name")
    shipped = recipe_files()
    if recipe is not None and recipe not in shipped:
        raise InputError(f"no recipe is called {recipe!r}; there are: {', '.join(shipped)}")
    source = shipped[recipe] if recipe else Path(str(resources.files("rlme") / "starter.yaml"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"wrote {path}; edit it, then: rlme train {path}")


def list_recipes(table: Path | None) -> None:
    """`rlme recipes`."""
    check_writable(table)
    rows = []
    for name, path in recipe_files().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        command = "align" if "judge" in read_yaml(path) else "train"
        rows.append({"recipe": name, "command": f"rlme {command} {name}", "about": first.lstrip("# ").strip()})
    shown = Table()
    shown.add_column("command")
    shown.add_column("about")
    for row in rows:
        shown.add_row(row["command"], Text(row["about"]))
    Console().print(shown)
    if table is not None:
        table.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def check_config(name: str, overrides: Sequence[str], *, show: bool) -> None:
    """`rlme check`."""
    config = read_config(name, overrides)
    if show:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    else:
        from rlme.training.check import check_file

        _quiet()
        for sentence in check_file(config):
            print(sentence)
        print(f"{name}: no problem found")


def run_quickstart(output: Path, overrides: Sequence[str], table: Path | None) -> None:
    """`rlme quickstart`: the shipped recipe, then held-out answers before and after, side by side."""
    from rlme.quickstart import before_after_answers

    check_writable(table)
    if read_config("quickstart", overrides, output).data.eval is None:
        raise InputError("data.eval is null, expected held-out prompts: quickstart shows answers before and after")
    folder = train_config("quickstart", overrides, output, None)
    before_after_answers(folder, Console(), table)

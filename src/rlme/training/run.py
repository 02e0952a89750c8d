"""A run from its configuration: build everything, train, save; resume; end cleanly on Ctrl-C."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOConfig

from rlme.config import Config, EvaluatorConfig
from rlme.config_file import read_yaml
from rlme.data import PromptSet
from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import STYLES, check_evaluator, make_judging, make_questions
from rlme.evaluators.local import LocalEvaluator
from rlme.evaluators.spending import call_off
from rlme.lora import lora_arguments
from rlme.models import check_gradient_checkpointing, load_model, load_tokenizer
from rlme.processes import leave_together
from rlme.reward import MetaReward
from rlme.training.build import (
    adopt,
    check_pairwise_judge,
    load_prompts,
    make_evaluator,
    make_reward,
    training_dataset,
)
from rlme.training.callbacks import Interrupt, MassWarning
from rlme.training.check import check_start
from rlme.training.costs import Costs
from rlme.training.display import Display
from rlme.training.recorder import Recorder
from rlme.training.run_folder import FORMAT, RunFolder
from rlme.training.settings import trl_arguments
from rlme.training.trainer import RLMETrainer


def train(
    config: Config,
    console: Console,
    *,
    resume: RunFolder | None = None,
    changed: dict[str, Any] | None = None,
) -> RunFolder:
    """Train as the file says, or go on with a run (`changed`: its configuration where that is another from now on).
    Returns its folder; `final/` holds the model."""
    with ExitStack() as held:
        return _train(config, console, held, resume, changed)


def _train(
    config: Config, console: Console, held: ExitStack, resume: RunFolder | None, changed: dict[str, Any] | None
) -> RunFolder:
    started = time.perf_counter()
    main = int(os.environ.get("RANK", "0")) == 0
    loading: dict[str, Any] = {
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
    }
    tokenizer = load_tokenizer(config.model.path, **loading)
    prompts, held_out = load_prompts(config, tokenizer)
    for name, part in (("train", prompts), ("eval", held_out)):
        if part is not None and main:
            for line in part.report.sentences():
                console.print(f"{name}: {line}", markup=False, highlight=False)
    questions = check_start(config, prompts, held_out)
    folder = resume or RunFolder(config.folder)
    arguments = trl_arguments(config, folder, processes=int(os.environ.get("WORLD_SIZE", "1")))
    with console.status(f"loading {config.model.path}"):
        model = load_model(config.model.path, dtype=config.model.dtype, **loading)
    if main:
        _warn_of_length(model, prompts, config, console)
    if arguments.gradient_checkpointing:
        check_gradient_checkpointing(model, "train.gradient_checkpointing")
    adapter = lora_arguments(config.lora, model)
    specs = config.evaluators if questions or config.reward.mode == "pairwise" else []
    spent = resume.read_spent() if resume is not None else {}
    evaluators = _load_evaluators(specs, config, model, tokenizer, console, spent)
    reward = make_reward(config, evaluators)
    digests = {part: found.digest() for part, found in (("train", prompts), ("eval", held_out)) if found is not None}
    if resume is not None:
        check_same(folder, digests)
        if (done := folder.last_checkpoint()[0]) > config.train.steps:
            raise InputError(f"train.steps is {config.train.steps}, but the run has done {done}")
    elif main:
        folder = RunFolder.create(config.folder)
    if main:
        held.enter_context(folder.locked())
    try:
        trainer = _make_trainer(config, model, adapter, reward, arguments, prompts, tokenizer)
    except Exception:
        if resume is None and main:
            shutil.rmtree(folder.path)  # nothing has happened in it
        raise
    adopt(reward, specs, trainer)
    checkpoint = None
    step = 0
    if trainer.accelerator.is_main_process:
        if resume is None:
            content = resolved(config, trainer)
            content["run_info"]["prompts"] = digests
            folder.write_config(content)
            step, checkpoint = 0, None
        else:
            if changed is not None:
                folder.write_config(changed)
            step, checkpoint = folder.rewind()
    trainer.accelerator.wait_for_everyone()
    if resume is not None and not trainer.accelerator.is_main_process:
        step, checkpoint = folder.last_checkpoint()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    display = Display(console, steps=config.train.steps, done=step, show_every=config.train.show_every)
    trainer.on_stage = display.stage
    watch = MassWarning(console, config.judging.mass_warning)
    costs = Costs(
        trainer,
        folder,
        console,
        steps=config.train.steps,
        held_out=len(held_out) if held_out is not None else 0,
        eval_every=config.train.eval_every,
    )
    costs.announce(step)

    def show(record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        display.update(record, rows)
        watch(record)
        costs.update(record)

    recorder = Recorder(
        trainer,
        folder,
        held_out=held_out,
        eval_every=config.train.eval_every,
        on_alarm=config.train.on_alarm,
        load_seconds=time.perf_counter() - started,
        costs=costs,
        on_step=show,
    )
    trainer.add_callback(recorder)
    trainer.checkpoint_done = lambda path: folder.finish_checkpoint(
        path, config.train.keep_checkpoints, recorder.protected
    )
    interrupt = Interrupt(console, trainer.accelerator)
    trainer.add_callback(interrupt)
    try:
        with display, interrupt:
            if step < config.train.steps:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            elif checkpoint is not None:
                trainer._load_from_checkpoint(str(checkpoint))
                trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                recorder.on_train_begin(arguments, trainer.state, trainer.control)
            elif held_out is not None:  # zero steps: only measure
                recorder.on_train_begin(arguments, trainer.state, trainer.control)
    except FloatingPointError as error:
        raise RunStopped(
            f"{error}: the run has diverged after step {trainer.state.global_step}. Its last checkpoint stays; a new "
            "run may go further with a lower train.learning_rate"
        ) from None
    except RunStopped as stop:
        call_off(costs.evaluators)
        costs.save(costs.totals())
        _save_where_it_stands(trainer, folder)
        leave_together()
        raise RunStopped(f"{stop}. The state is saved: rlme train --resume {folder.path}") from None
    except BaseException:
        if trainer.accelerator.num_processes == 1:  # else the others cannot be asked any more
            call_off(costs.evaluators)
            costs.save(costs.totals())
        raise
    if interrupt.stopped:
        leave_together()
        raise RunStopped(
            f"stopped after step {trainer.state.global_step}, state saved; "
            f"go on with: rlme train --resume {folder.path}"
        )
    if recorder.stopped_by:
        leave_together()
        raise RunStopped(
            f"stopped by the alarm after step {trainer.state.global_step}: {recorder.stopped_by} "
            f"(go on all the same: rlme train --resume {folder.path} --set train.on_alarm=warn)"
        )
    save_final(trainer, folder, config.model.path)
    leave_together()
    return folder


def _warn_of_length(model: Any, prompts: PromptSet, config: Config, console: Console) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    longest, most = prompts.report.longest_tokens or 0, config.train.max_completion_tokens
    if 0 < limit < longest + most:
        console.print(
            f"warning: the model reads at most {limit} tokens, and the longest prompt ({longest}) with a completion of "
            f"{most} has more",
            style="yellow",
        )


def _load_evaluators(
    specs: Sequence[EvaluatorConfig],
    config: Config,
    model: Any,
    tokenizer: Any,
    console: Console,
    spent: Mapping[str, Mapping[str, float]],
) -> list[str | Evaluator]:
    """The evaluators, `live` and `frozen` by name where they are the policy itself. What cannot be asked is said now,
    before anything is written."""
    questions, judging = make_questions(config.questions), make_judging(config.judging)
    deferred = {"live"} | ({"frozen"} if config.lora else set())
    with console.status("loading the evaluators"):
        evaluators = [str(s.model) if s.model in deferred else make_evaluator(s, config, spent=spent) for s in specs]
    for spec, evaluator in zip(specs, evaluators, strict=True):
        asked = (
            LocalEvaluator(model, tokenizer, name=spec.label, chat=STYLES[spec.style])
            if isinstance(evaluator, str)
            else evaluator
        )
        if config.reward.mode == "pairwise":
            check_pairwise_judge(asked, config)
        else:
            check_evaluator(asked, questions, judging)
        if found := getattr(asked, "summary", None):
            console.print(found, markup=False, highlight=False)
    return evaluators


def _make_trainer(
    config: Config,
    model: Any,
    adapter: Any,
    reward: MetaReward,
    arguments: GRPOConfig,
    prompts: PromptSet,
    tokenizer: Any,
) -> RLMETrainer:
    try:
        return RLMETrainer(
            model,
            reward,
            share_prefixes=config.train.share_prefixes,
            token_budget=config.train.token_budget,
            stop_strings=config.train.stop,
            args=arguments,
            train_dataset=training_dataset(prompts, config),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    except Exception as error:
        if not config.trl or isinstance(error, InputError):
            raise
        keys = ", ".join(f"trl.{key}" for key in config.trl)
        raise InputError(f"TRL does not start with {keys} as given: {error}") from error


def check_same(folder: RunFolder, digests: dict[str, str]) -> None:
    """Refuse to go on with other prompts or processes than at first (an older run did not note its prompts)."""
    info = read_yaml(folder.config).get("run_info", {})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if info.get("processes", processes) != processes:
        raise InputError(
            f"{folder.config}: the run began with {info['processes']} processes, and these are {processes}"
        )
    before = info.get("prompts", digests)
    for part, digest in digests.items():
        if before.get(part, digest) != digest:
            raise InputError(
                f"{folder.config}: data.{part} gives other prompts than when the run began; expected the same file, or "
                "a new run"
            )


def _save_where_it_stands(trainer: RLMETrainer, folder: RunFolder) -> None:
    """A checkpoint of the last finished update, unless it has one (or nothing was done yet)."""
    done, _ = folder.last_checkpoint()
    if trainer.state.global_step > done:
        trainer._save_checkpoint(trainer.model, None)


def save_final(trainer: RLMETrainer, folder: RunFolder, base: str) -> None:
    """The trained model as safetensors in `final/`; a LoRA adapter is merged, and kept beside in `final-adapter/`
    (with FSDP or DeepSpeed, `final/` holds the adapter itself)."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    model = trainer.accelerator.unwrap_model(trainer.model)
    partial = folder.path / "final.partial"
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # no process holds the weights to merge
    if hasattr(model, "merge_and_unload") and not sharded:
        if trainer.accelerator.is_main_process:
            for adapter in model.peft_config.values():  # which an adapter's own base may stand below
                adapter.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
            model.save_pretrained(folder.path / "final-adapter")
            merged = model.merge_and_unload()
            merged.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.accelerator.is_main_process:
        (partial / "training_args.bin").unlink(missing_ok=True)
        trainer.processing_class.save_pretrained(partial)
        os.replace(partial, folder.final)


def resolved(config: Config, trainer: RLMETrainer) -> dict[str, Any]:
    """The configuration as run, with versions, seeds and machine."""
    content = config.model_dump(mode="json")
    for section, key in (("model", "path"), ("data", "train"), ("data", "eval")):
        value = content[section][key]
        if value and Path(value).exists():
            content[section][key] = str(Path(value).resolve())  # so that a resume works from anywhere
    for spec in content["evaluators"]:
        if spec["model"] not in (None, "live", "frozen") and Path(spec["model"]).exists():
            spec["model"] = str(Path(spec["model"]).absolute())  # not resolved: a link's name is the evaluator's
    if content["judging"]["cache"]:
        content["judging"]["cache"] = str(Path(content["judging"]["cache"]).absolute())
    pairs = content["reward"]["pairwise"]
    if pairs and Path(pairs["protocol"]).is_file():
        pairs["protocol"] = str(Path(pairs["protocol"]).absolute())
    content["run_info"] = {
        "format": FORMAT,
        "rlme": _version("rlme"),
        "versions": {
            name: _version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
        },
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "seed": config.train.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {trainer.accelerator.device}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "threads": torch.get_num_threads(),
        "processes": trainer.accelerator.num_processes,
    }
    return content


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None

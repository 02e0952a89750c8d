"""A run from its configuration: build everything, train, save; resume; end cleanly on Ctrl-C."""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import signal
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig

from rlme.config import Config, EvaluatorConfig, TemplateConfig
from rlme.data import PromptSet, build_prompts, load_rows
from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.judging import Judging, check_templates
from rlme.models import has_chat_template, load_model, load_tokenizer
from rlme.questions import Question, Template
from rlme.reward import MetaReward, anchored_rows
from rlme.training.display import Display
from rlme.training.recorder import Recorder
from rlme.training.run_folder import FORMAT, RunFolder
from rlme.training.trainer import RLMETrainer

# Arguments of TRL that our own keys set; asking for them under `trl:` names the key to use.
_OURS = {
    "output_dir": "output",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "num_generations": "train.group_size",
    "generation_batch_size": "train.prompts_per_step",
    "learning_rate": "train.learning_rate",
    "max_completion_length": "train.max_completion_tokens",
    "temperature": "train.temperature",
    "top_p": "train.top_p",
    "top_k": "train.top_k",
    "min_p": "train.min_p",
    "repetition_penalty": "train.repetition_penalty",
    "loss_type": "train.loss",
    "epsilon": "train.clip",
    "epsilon_high": "train.clip",
    "importance_sampling_level": "train.ratio",
    "num_iterations": "train.updates_per_batch",
    "beta": "train.kl",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "save_strategy": "train.checkpoint_every",
    "eval_strategy": "train.eval_every",
    "logging_steps": "metrics.jsonl, which has a line for every step",
    "resume_from_checkpoint": "rlme train --resume",
    "reward_weights": "questions and evaluators (their weights)",
}


def trl_arguments(config: Config, folder: RunFolder, *, processes: int = 1) -> GRPOConfig:
    """The paper's settings (RLME App. A) and the file's, as TRL arguments; `trl:` comes last."""
    train = config.train
    known = {f.name for f in dataclasses.fields(GRPOConfig) if f.init}
    for key in config.trl:
        if key in _OURS:
            raise InputError(f"trl.{key} is set by this project: use {_OURS[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise InputError(
                f"trl.{key} is no argument of TRL's GRPOConfig" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    batch = train.prompts_per_step * train.group_size
    if batch % processes:
        raise InputError(
            f"train.prompts_per_step * train.group_size is {batch}, expected a multiple of the {processes} processes"
        )
    cispo = train.loss == "cispo"
    clip = train.clip if train.clip is not None else 5.0 if cispo else 0.2
    bf16 = train.precision == "bfloat16" or (train.precision == "auto" and torch.cuda.is_available())
    settings: dict[str, Any] = {
        "output_dir": str(folder.checkpoints),
        "max_steps": train.steps,
        "per_device_train_batch_size": batch // processes,
        "gradient_accumulation_steps": 1,
        "num_generations": train.group_size,
        "num_iterations": train.updates_per_batch,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-15,
        "max_completion_length": train.max_completion_tokens,
        "temperature": train.temperature,
        "top_p": train.top_p,
        "top_k": train.top_k,
        "min_p": train.min_p or None,
        "repetition_penalty": train.repetition_penalty,
        "loss_type": train.loss,
        # TRL's CISPO clamps the ratio at epsilon_high itself, an absolute upper bound; it has no lower one
        "epsilon": 1e4 if cispo else clip,
        "epsilon_high": clip if cispo else None,
        "importance_sampling_level": train.ratio,
        "scale_rewards": "none",
        "beta": train.kl,
        "bf16": bf16,
        "gradient_checkpointing": train.gradient_checkpointing,
        "seed": train.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    accumulate = config.trl.get("gradient_accumulation_steps")
    if accumulate and "per_device_train_batch_size" not in config.trl:
        settings["per_device_train_batch_size"] = batch // processes // accumulate
    try:
        return GRPOConfig(**(settings | config.trl))
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"TRL does not accept these settings: {error}") from None


def load_prompts(config: Config, tokenizer: Any) -> tuple[PromptSet, PromptSet | None]:
    """Training prompts and (where given) held-out ones."""
    data = config.data
    sets = []
    for source, split, limit in (
        (data.train, data.split, data.limit),
        (data.eval, data.eval_split, data.eval_limit),
    ):
        if source is None:
            sets.append(None)
            continue
        rows = load_rows(source, split=split, name=data.name, limit=limit)
        sets.append(
            build_prompts(
                rows,
                prompt=data.prompt,
                system=data.system,
                answer=data.answer,
                answer_from=data.answer_format,
                tokenizer=tokenizer,
                chat=data.chat,
                max_prompt_tokens=data.max_prompt_tokens,
            )
        )
    train, held_out = sets
    assert train is not None
    return train, held_out


def make_questions(config: Config) -> list[Question]:
    """The file's questions."""
    return [
        Question(q.ask, name, q.weight, q.target, _template(q.template), q.readout)
        for name, q in config.questions.items()
    ]


def make_judging(config: Config) -> Judging:
    """The file's judging section."""
    j = config.judging
    template = _template(j.template)
    assert template is not None
    return Judging(template, j.readout, j.joint, j.reason_tokens, j.reason_then)


def _template(value: str | TemplateConfig | None) -> str | Template | None:
    return Template(value.kind, value.text) if isinstance(value, TemplateConfig) else value


def make_evaluator(spec: EvaluatorConfig, config: Config) -> str | Evaluator:
    """One evaluator of the file; `live` and a LoRA run's `frozen` stay names until there is a trainer."""
    if spec.endpoint is not None:
        from rlme.evaluators.endpoint import EndpointEvaluator

        return EndpointEvaluator(spec.endpoint, name=spec.label)
    assert spec.model is not None
    from rlme.evaluators.build import model_evaluator

    source, loading = spec.model, {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if source == "frozen":
        # Without an adapter to switch off, the frozen self is a copy, loaded from where the policy came from: a
        # resumed run must not freeze the weights it resumes with.
        source = config.model.path
        loading = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    chat = {"auto": None, "chat": True, "completion": False}[spec.style]
    return model_evaluator(
        source,
        name=spec.label,
        dtype=spec.dtype,
        load_in_4bit=spec.load_in_4bit,
        chat=chat,
        token_budget=config.train.token_budget,
        share=config.train.share_prefixes,
        max_context_tokens=config.judging.max_context_tokens,
        **loading,
    )


def make_reward(config: Config, evaluators: list[str | Evaluator]) -> MetaReward:
    """The file's reward."""
    return MetaReward(
        make_questions(config),
        evaluators,
        evaluator_weights=config.evaluator_weights(),
        judging=make_judging(config),
        mode=config.reward.mode,
        combine=config.reward.combine,
        rlvr_weight=config.reward.rlvr_weight,
        rlme_weight=config.reward.rlme_weight,
        answer="gold" if config.data.answer else None,
        completion_format=config.data.completion_format,
        compare=config.data.compare,
        max_failure_rate=config.reward.max_failure_rate,
        token_budget=config.train.token_budget,
        share_prefixes=config.train.share_prefixes,
        max_context_tokens=config.judging.max_context_tokens,
    )


def train(config: Config, console: Console, *, resume: RunFolder | None = None) -> RunFolder:
    """Train as the file says, or go on with a run. Returns its folder; `final/` holds the model."""
    started = time.perf_counter()
    main = int(os.environ.get("RANK", "0")) == 0
    loading = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    tokenizer = load_tokenizer(config.model.path, **loading)
    prompts, held_out = load_prompts(config, tokenizer)
    for name, part in (("train", prompts), ("eval", held_out)):
        if part is not None and main:
            for line in part.report.sentences():
                console.print(f"{name}: {line}", markup=False, highlight=False)
    if config.reward.mode != "rlme" or config.reward.anchor > 0:
        prompts.require_gold()
    judged = bool(config.questions)
    if judged:
        check_templates(make_questions(config), make_judging(config), list(prompts.prompts[0].columns))
    for spec in config.evaluators if judged else ():
        if spec.style == "chat" and spec.model in ("live", "frozen") and not has_chat_template(tokenizer):
            raise InputError(
                f"evaluator {spec.label!r} has style: chat, but the tokenizer of {config.model.path} has no chat "
                "template; use style: completion"
            )
    folder = resume or RunFolder(config.folder)
    arguments = trl_arguments(config, folder, processes=int(os.environ.get("WORLD_SIZE", "1")))
    model = load_model(config.model.path, dtype=config.model.dtype, **loading)
    specs = config.evaluators if judged else []
    deferred = {"live"} | ({"frozen"} if config.lora else set())
    evaluators = [str(s.model) if s.model in deferred else make_evaluator(s, config) for s in specs]
    reward = make_reward(config, evaluators)
    if resume is None and main:
        folder = RunFolder.create(config.folder)
    trainer = RLMETrainer(
        model,
        reward,
        share_prefixes=config.train.share_prefixes,
        token_budget=config.train.token_budget,
        stop_strings=config.train.stop,
        args=arguments,
        train_dataset=_dataset(prompts, config),
        processing_class=tokenizer,
        peft_config=_lora(config),
    )
    _adopt(reward, specs, trainer, config)
    checkpoint = None
    step = 0
    if trainer.accelerator.is_main_process:
        if resume is None:
            folder.write_config(resolved(config, trainer))
            step, checkpoint = 0, None
        else:
            step, checkpoint = folder.rewind()
    trainer.accelerator.wait_for_everyone()
    if resume is not None and not trainer.accelerator.is_main_process:
        step, checkpoint = folder.last_checkpoint()
    trainer.checkpoint_done = lambda path: folder.finish_checkpoint(path, config.train.keep_checkpoints)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    display = Display(console, steps=config.train.steps, done=step, show_every=config.train.show_every)
    watch = _MassWarning(console, config.judging.mass_warning)

    def show(record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        display.update(record, rows)
        watch(record)

    recorder = Recorder(
        trainer,
        folder,
        held_out=held_out,
        eval_every=config.train.eval_every,
        on_alarm=config.train.on_alarm,
        load_seconds=time.perf_counter() - started,
        on_step=show,
    )
    trainer.add_callback(recorder)
    interrupt = Interrupt(console)
    trainer.add_callback(interrupt)
    try:
        with display, interrupt:
            if step < config.train.steps:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            elif checkpoint is not None:
                trainer._load_from_checkpoint(str(checkpoint))
            elif held_out is not None:  # zero steps: only measure
                recorder.on_train_begin(arguments, trainer.state, trainer.control)
    except RunStopped as stop:
        _save_where_it_stands(trainer, folder)
        raise RunStopped(f"{stop}. The state is saved: rlme train --resume {folder.path}") from None
    if interrupt.requested:
        raise RunStopped(
            f"stopped after step {trainer.state.global_step}, state saved; go on with: rlme train --resume {folder.path}"
        )
    if recorder.stopped_by:
        raise RunStopped(
            f"stopped by the alarm after step {trainer.state.global_step}: {recorder.stopped_by} "
            f"(go on all the same: rlme train --resume {folder.path} --set train.on_alarm=warn)"
        )
    save_final(trainer, folder)
    return folder


def _dataset(prompts: PromptSet, config: Config) -> Any:
    dataset = prompts.to_dataset()
    if config.data.answer is None:
        dataset = dataset.remove_columns("gold")
    if config.reward.anchor > 0:
        dataset = dataset.add_column(
            "anchored", anchored_rows(len(dataset), config.reward.anchor, seed=config.train.seed)
        )
    return dataset


def _lora(config: Config) -> Any:
    if config.lora is None:
        return None
    from peft import LoraConfig

    lora = config.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _adopt(reward: MetaReward, specs: list[EvaluatorConfig], trainer: RLMETrainer, config: Config) -> None:
    """Turn the names `live` and `frozen` into evaluators that borrow this trainer's policy."""
    from rlme.evaluators.build import named_evaluator

    chosen = reward._evaluators
    for i, spec in enumerate(specs):
        source = chosen[i]
        if isinstance(source, str):
            chosen[i] = named_evaluator(
                source,
                trainer,
                name=spec.label,
                chat={"auto": None, "chat": True, "completion": False}[spec.style],
                **reward._options,
            )


def _save_where_it_stands(trainer: RLMETrainer, folder: RunFolder) -> None:
    """A checkpoint of the last finished update, unless it has one (or nothing was done yet)."""
    done, _ = folder.last_checkpoint()
    if trainer.state.global_step > done:
        trainer._save_checkpoint(trainer.model, None)


def save_final(trainer: RLMETrainer, folder: RunFolder) -> None:
    """The trained model as safetensors in `final/`; a LoRA adapter is merged, and kept beside in `final-adapter/`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    partial = folder.path / "final.partial"
    if hasattr(model, "merge_and_unload"):
        if trainer.accelerator.is_main_process:
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


class Interrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the current step with everything saved; a second one ends it at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("stopping after this step; press Ctrl-C again to stop at once (the last checkpoint stays)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop."""
        if self.requested:
            control.should_save = control.should_training_stop = True


class _MassWarning:
    """Warn once per question when its labels hold little of the evaluator's probability."""

    def __init__(self, console: Console, threshold: float) -> None:
        self.console, self.threshold = console, threshold
        self.warned: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key.startswith("judge/") and key.endswith("/mass") and value < self.threshold and key not in self.warned:
                self.warned.add(key)
                _, evaluator, question, _ = key.split("/", 3) if key.count("/") == 3 else ("", key, "", "")
                self.console.print(
                    f"warning: evaluator {evaluator!r} puts only {value:.0%} of its probability on the labels of "
                    f"question {question!r}; its verdicts may mean little (try another template or read-out)",
                    style="yellow",
                    markup=False,
                )

"""The two training stages, by TRL's trainers: SFT on the references, DPO on the pairs."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.progress import Progress
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from rlme.align.config import AlignConfig, DPOStage, SFTStage
from rlme.align.pairs import Pair
from rlme.checkpoints import ReadsCheckpoints
from rlme.errors import InputError
from rlme.lora import lora_arguments
from rlme.memory import keep_freed_memory, prefer_huge_pages
from rlme.models import default_device, fast_bfloat16
from rlme.progress import SlowProgress
from rlme.training.settings import check_arguments

Example = dict[str, Any]
# Arguments that keys of the stage set; under `trl:` they would contradict them.
_OURS = {
    "output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "max_length", "warmup_steps", "warmup_ratio", "beta", "seed", "data_seed", "save_strategy", "save_steps",
    "save_total_limit", "completion_only_loss", "precompute_ref_log_probs", "gradient_checkpointing", "bf16", "fp16",
    "disable_tqdm", "resume_from_checkpoint",
}  # fmt: skip


class _SFT(ReadsCheckpoints, SFTTrainer):
    pass


class _DPO(ReadsCheckpoints, DPOTrainer):
    pass


def sft(config: AlignConfig, model: Any, tokenizer: Any, examples: Sequence[Example], folder: Path) -> dict[str, float]:
    """Fine-tune on `prompt` -> `completion` examples and save the model under `folder`/model."""
    data = Dataset.from_list(list(examples))
    trainer = _SFT(
        model,
        args=sft_arguments(config, folder, len(examples)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_arguments(config.lora, model),
    )
    return _train(trainer, tokenizer, folder, "sft")


def dpo(config: AlignConfig, model: Any, tokenizer: Any, pairs: Sequence[Pair], folder: Path) -> dict[str, float]:
    """Train on the pairs, against the model as it comes in, and save it under `folder`/model.

    The reference log-probabilities are computed once, before the first update, so no second model is held.
    """
    data = Dataset.from_list(
        [
            {"prompt": pair.prompt, "chosen": as_answer(pair.prompt, pair.chosen)}
            | {"rejected": as_answer(pair.prompt, pair.rejected)}
            for pair in pairs
        ]
    )
    trainer = _DPO(
        model,
        args=dpo_arguments(config, folder, len(pairs)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_arguments(config.lora, model),
    )
    return _train(trainer, tokenizer, folder, "dpo")


def sft_arguments(config: AlignConfig, folder: Path, examples: int) -> SFTConfig:
    """The stage's settings as TRL takes them.

    Raises:
        InputError: naming what TRL does not take in `sft.trl`.
    """
    assert config.sft is not None
    settings = _settings(config, config.sft, folder, examples) | {
        "lr_scheduler_type": "linear",
        "completion_only_loss": True,
    }
    return _arguments(SFTConfig, settings, config.sft.trl, "sft.trl")


def dpo_arguments(config: AlignConfig, folder: Path, pairs: int) -> DPOConfig:
    """As `sft_arguments`."""
    settings = _settings(config, config.dpo, folder, pairs) | {
        "lr_scheduler_type": "cosine",
        "beta": config.dpo.beta,
        "loss_type": ["sigmoid"],
        "precompute_ref_log_probs": True,
        "max_grad_norm": 0.0,  # no clipping, as in the authors' code
    }
    return _arguments(DPOConfig, settings, config.dpo.trl, "dpo.trl")


def as_answer(prompt: Any, text: str) -> Any:
    """The answer in the form of its prompt: text, or one assistant turn."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _settings(config: AlignConfig, stage: SFTStage | DPOStage, folder: Path, examples: int) -> dict[str, Any]:
    batch = min(stage.batch_size, examples)
    device_batch = min(stage.device_batch_size, batch)
    updates = math.ceil(examples / batch) * stage.epochs
    return {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": stage.epochs,
        "per_device_train_batch_size": device_batch,
        "gradient_accumulation_steps": math.ceil(batch / device_batch),
        "max_length": stage.max_tokens,
        "learning_rate": stage.learning_rate,
        # Rounded down: given as a share, it is rounded up, and the only update of a small run would have rate 0.
        "warmup_steps": int(stage.warmup * updates),
        "weight_decay": 0.0,
        "seed": config.seed,
        "data_seed": config.seed,
        "save_strategy": "steps",
        "save_steps": stage.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "bf16": fast_bfloat16(),
        "use_cpu": default_device().type == "cpu",  # Transformers wants this said before it allows bfloat16 there
        "gradient_checkpointing": stage.gradient_checkpointing,
    }


def _arguments(kind: type[Any], settings: dict[str, Any], extra: dict[str, Any], where: str) -> Any:
    ours = dict.fromkeys(_OURS, "the key of the stage")
    check_arguments(kind, extra, where, ours=ours, untyped=["loss_type"])  # of a list of losses TRL also takes one name
    try:
        arguments = kind(**(settings | extra))
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: TRL refuses several in one
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # raises where its package is missing
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        keys = ", ".join(f"{where}.{key}" for key in extra) or where
        raise InputError(f"{keys}: TRL does not accept these settings: {error}") from None
    if arguments.eval_strategy != "no":
        raise InputError(f"{where}.eval_strategy is {extra['eval_strategy']!r}, expected no: the stage only trains")
    return arguments


disable_progress_bars()  # a bar for each of TRL's small steps would bury ours


def _train(trainer: Any, tokenizer: Any, folder: Path, title: str) -> dict[str, float]:
    keep_freed_memory(trainer.accelerator.device)
    prefer_huge_pages(trainer.accelerator.device)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"), key=_step)
    with SlowProgress(transient=True) as progress:
        trainer.add_callback(_Bar(progress, title))
        trainer.train(resume_from_checkpoint=str(checkpoints[-1].parent) if checkpoints else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    history = [row for row in trainer.state.log_history if "loss" in row]
    summary = {"updates": float(trainer.state.global_step)}
    if history:
        summary |= {"first_loss": float(history[0]["loss"]), "last_loss": float(history[-1]["loss"])}
        for key in ("rewards/accuracies", "rewards/margins"):
            if key in history[-1]:
                summary[key] = float(history[-1][key])
    trainer.accelerator.free_memory()
    gc.collect()
    return summary


def _step(state: Path) -> int:
    return int(state.parent.name.rsplit("-", 1)[1])


class _Bar(TrainerCallback):
    """A progress bar with the loss."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title
        self.task = progress.add_task(title, total=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, description=f"{self.title} loss {float(logs['loss']):.3f}")

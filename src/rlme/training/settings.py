"""The file's training settings as TRL arguments."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from trl import GRPOConfig

from rlme.config import Config
from rlme.errors import InputError
from rlme.models import default_device, fast_bfloat16
from rlme.training.run_folder import RunFolder

# Arguments of TRL that our own keys set; asking for them under `trl:` names the key to use.
_OURS = {
    "output_dir": "output",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "num_generations": "train.group_size",
    "num_generations_eval": "data.eval, whose prompts are answered once each",
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
    "logging_strategy": "metrics.jsonl, which has a line for every step",
    "remove_unused_columns": "the data as they are: all columns are kept",
    "save_only_model": "train.checkpoint_every: a checkpoint holds all that resume needs",
    "ignore_data_skip": "rlme train --resume",
    "eval_on_start": "data.eval, which is measured before the first step",
    "trust_remote_code": "model.trust_remote_code",
    "resume_from_checkpoint": "rlme train --resume",
    "reward_weights": "questions and evaluators (their weights)",
}


def trl_arguments(config: Config, folder: RunFolder, *, processes: int = 1) -> GRPOConfig:
    """The paper's settings (RLME App. A) and the file's, as TRL arguments; `trl:` comes last."""
    train = config.train
    check_arguments(GRPOConfig, config.trl, "trl", ours=_OURS)
    batch = train.prompts_per_step * train.group_size
    if batch % processes:
        raise InputError(
            f"train.prompts_per_step * train.group_size is {batch}, expected a multiple of the {processes} processes"
        )
    if config.reward.mode == "pairwise" and train.prompts_per_step % processes:
        raise InputError(
            f"train.prompts_per_step is {train.prompts_per_step}, expected a multiple of the {processes} processes: "
            "reward.mode pairwise compares the completions of a group, so each has to be in one process"
        )
    cispo = train.loss == "cispo"
    clip = train.clip if train.clip is not None else 5.0 if cispo else 0.2
    bf16 = train.precision == "bfloat16" or (train.precision == "auto" and fast_bfloat16())
    settings: dict[str, Any] = {
        "output_dir": str(folder.checkpoints),
        "max_steps": train.steps,
        "per_device_train_batch_size": batch // processes,
        "gradient_accumulation_steps": 1,
        "num_generations": train.group_size,
        "num_generations_eval": 1,  # of held-out prompts: vLLM's server takes every n-th prompt of a batch
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
        "use_cpu": default_device().type == "cpu",  # Transformers wants this said before it allows bfloat16 there
        "gradient_checkpointing": train.gradient_checkpointing,
        "seed": train.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "trust_remote_code": config.model.trust_remote_code,
    }
    accumulate = config.trl.get("gradient_accumulation_steps", 1)
    if accumulate < 1:
        raise InputError(f"trl.gradient_accumulation_steps is {accumulate}, expected at least 1")
    if accumulate > 1 and "per_device_train_batch_size" not in config.trl:
        if batch // processes % accumulate:
            raise InputError(
                f"trl.gradient_accumulation_steps is {accumulate}, expected a divisor of the {batch // processes} "
                "completions that a process has in a step (train.prompts_per_step * train.group_size)"
            )
        settings["per_device_train_batch_size"] = batch // processes // accumulate
    try:
        arguments = GRPOConfig(**(settings | config.trl))
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"TRL does not accept these settings: {error}") from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one GPU; TRL refuses several without a launcher
    made = arguments.per_device_train_batch_size * arguments.steps_per_generation * processes
    if made != batch:
        raise InputError(
            f"trl.per_device_train_batch_size * trl.steps_per_generation * {processes} processes is {made}, expected "
            f"train.prompts_per_step * train.group_size, which is {batch}"
        )
    if arguments.steps_per_generation % arguments.gradient_accumulation_steps:
        raise InputError(
            f"trl.steps_per_generation is {arguments.steps_per_generation}, expected a multiple of "
            f"trl.gradient_accumulation_steps, which is {arguments.gradient_accumulation_steps}"
        )
    return arguments


def check_arguments(
    kind: type[Any], values: Mapping[str, Any], where: str, *, ours: Mapping[str, str], untyped: Collection[str] = ()
) -> None:
    """Refuse what is no argument of TRL's, what is `ours` (by argument: what to use instead), and values that are not
    what the annotations say: TRL takes anything and fails later. `untyped`: where it takes more than they say."""
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key in ours:
            raise InputError(f"{where}.{key} is set by this project: use {ours[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}.{key} is no argument of TRL's {kind.__name__}{hint}")
        if key in untyped:
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except PydanticSchemaGenerationError:  # an annotation of torch's or transformers' own
            continue
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("a ").partition(",")[0]
            raise InputError(f"{where}.{key} is {value!r}, expected {what}") from None

"""The policy as its own evaluator: live (current weights) and frozen (weights at step 0), no second copy needed.

Both borrow the trainer's model for the duration of a call, without gradient. With LoRA the frozen self is the base
model with the adapter switched off; without it, the caller loads one frozen copy (a `LocalEvaluator`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trl.models import unwrap_model_for_generation

from rlme.cast_weights import weights_in
from rlme.errors import InputError
from rlme.evaluators.local import LocalEvaluator
from rlme.key_values import KeyValues


def live_evaluator(trainer: Any, *, name: str = "live", **options: Any) -> LocalEvaluator:
    """The trainer's model as it is now. `trainer` is any TRL `GRPOTrainer`; where ours has just sampled with these
    weights, keys and values of prompts and completions are not computed again."""
    _check_whole(trainer)

    def known() -> KeyValues | None:
        found: KeyValues | None = getattr(trainer, "key_values", None)
        return found

    def policy() -> Any:
        return _policy(trainer, adapter=True, as_sampled=known() is not None)

    return LocalEvaluator(policy, trainer.processing_class, name=name, known=known, **options)


def frozen_adapter_evaluator(trainer: Any, *, name: str = "frozen", **options: Any) -> LocalEvaluator:
    """The trainer's PEFT model with its adapter off: the weights at step 0, without a second copy."""
    _check_whole(trainer)
    return LocalEvaluator(lambda: _policy(trainer, adapter=False), trainer.processing_class, name=name, **options)


def _check_whole(trainer: Any) -> None:
    if getattr(trainer, "is_fsdp_enabled", False):
        raise InputError(
            "trl.fsdp: the policy cannot judge while its weights are spread over processes that judge different "
            "numbers of texts; use trl.deepspeed, or another model as the evaluator"
        )
    if getattr(trainer, "is_deepspeed_enabled", False) and not trainer.args.ds3_gather_for_generation:
        raise InputError("trl.ds3_gather_for_generation is false: the policy cannot judge while its weights are spread")


@contextmanager
def unwrapped(trainer: Any) -> Iterator[Any]:
    """The policy without wrappers, whole under DeepSpeed, for passes in evaluation mode. Gradient checkpointing does
    nothing there, so it stays as it is: TRL's way of switching it off and on again forgets its settings, and leaves one
    more hook at the embeddings each time."""
    if not getattr(trainer, "is_deepspeed_enabled", False):
        yield trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
        return
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        yield model


@contextmanager
def _policy(trainer: Any, *, adapter: bool, as_sampled: bool = False) -> Iterator[Any]:
    """`as_sampled`: in bfloat16 as the sampler computes it (cast weights); else as the loss does (autocast)."""
    with unwrapped(trainer) as model:
        training = model.training
        model.eval()
        off = nullcontext() if adapter else model.disable_adapter()
        bf16 = trainer.args.bf16 and model.dtype == torch.float32
        cast = weights_in(model, torch.bfloat16 if bf16 and as_sampled else None)
        try:
            with (
                off,
                cast,
                torch.autocast(trainer.accelerator.device.type, torch.bfloat16, enabled=bf16 and not as_sampled),
            ):
                yield model
        finally:
            model.train(training)

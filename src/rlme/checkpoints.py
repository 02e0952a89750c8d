"""What is in a checkpoint beside what Transformers puts there, and its weights back into the model that is trained."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlme.errors import InputError

REFERENCE = "reference.pt"  # of the KL, where it follows the policy


class ReadsCheckpoints:
    """Mixed into a trainer: weights that are saved under other names than the model's are read as well.

    Transformers' own resume takes the names in the file for those in the model. Those of many a mixture of experts
    differ (each expert is saved by itself, all are held in one tensor), and it goes on with experts as they were when
    the run began, and a warning.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        model = model if model is not None else trainer.model
        try:
            if is_peft_model(model) or trainer.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            else:
                self._load_whole(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise InputError(_unreadable(resume_from_checkpoint, error)) from None

    def _load_whole(self, folder: str, model: Any) -> None:
        written: dict[str, torch.Tensor] = {}
        for file in Path(folder).glob("model*.safetensors"):
            written |= load_file(file)
        result = model.load_state_dict(written, strict=False)
        if result.unexpected_keys:
            dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds all of them exactly
            saved = type(model).from_pretrained(folder, config=model.config, dtype=dtype).state_dict()
            model.load_state_dict({name: saved[name] for name in result.missing_keys}, strict=False)


def _unreadable(folder: str | None, error: Exception) -> str:
    return f"{folder} cannot be read ({error}); delete this folder to go on from the checkpoint before it"


class KeepsRollouts(ReadsCheckpoints):
    """Mixed into a GRPO trainer: in the middle of several updates on one batch, the batch belongs to the state."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        served = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations)
        if trainer._buffered_inputs is not None and served:
            torch.save(trainer._buffered_inputs, folder / f"rollout_buffer_{trainer.accelerator.process_index}.pt")
        moves = trainer.args.sync_ref_model and trainer.ref_model is not None and not trainer._sharded
        if moves and trainer.accelerator.is_main_process:
            reference = trainer.accelerator.unwrap_model(trainer.ref_model)  # it moves, and nobody else saves it
            torch.save(reference.state_dict(), folder / REFERENCE)
        trainer.accelerator.wait_for_everyone()
        if trainer.checkpoint_done is not None and trainer.accelerator.is_main_process:
            trainer.checkpoint_done(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called once on resume, after the weights are back: restore what Transformers and TRL do not."""
        trainer: Any = self
        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
            raise InputError(_unreadable(checkpoint, error)) from None
        if checkpoint is None:
            return
        trainer._step = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        trainer.state.save_steps = trainer.args.save_steps  # the checkpoint's state has that of the start before
        buffer = Path(checkpoint) / f"rollout_buffer_{trainer.accelerator.process_index}.pt"
        if buffer.is_file():
            device = trainer.accelerator.device
            trainer._buffered_inputs = torch.load(buffer, map_location=device, weights_only=True)
        reference = Path(checkpoint) / REFERENCE
        if trainer.args.sync_ref_model and reference.is_file():
            weights = torch.load(reference, map_location="cpu", weights_only=True)
            trainer.accelerator.unwrap_model(trainer.ref_model).load_state_dict(weights)

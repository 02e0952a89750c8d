"""A checkpoint's weights, back into the model that is being trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlme.errors import InputError


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
            raise InputError(
                f"{resume_from_checkpoint}: its weights cannot be read ({error}); delete this folder to go on from the "
                "checkpoint before it"
            ) from None

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

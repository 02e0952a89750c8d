"""A checkpoint's weights, back into the model that is being trained."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model


class ReadsCheckpoints:
    """Mixed into a trainer: full weights are read as `from_pretrained` reads them.

    Transformers' own resume takes the names in the file for those in the model. Those of many a mixture of experts
    differ (each expert is saved by itself, all are held in one tensor), and it goes on with experts as they were when
    the run began, and a warning.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        model = model if model is not None else trainer.model
        if is_peft_model(model) or trainer.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds all of them exactly
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=dtype)
        model.load_state_dict(saved.state_dict())

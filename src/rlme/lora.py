"""The adapter that a configuration asks for (PEFT), tried on the model's shape before anything is written."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlme.config import LoraConfig
from rlme.errors import InputError


def lora_arguments(lora: LoraConfig | None, model: PreTrainedModel) -> Any:
    """PEFT's configuration, or None when all weights are trained.

    Raises `InputError` where the model has no such modules, or PEFT cannot adapt them.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and (lora is None or not (quantizer and quantizer.is_trainable)):
        how = "add `lora: {}` to train an adapter" if lora is None else "nor can an adapter on them"
        raise InputError(f"model: its weights are quantised and cannot be trained; {how}")
    if lora is None:
        return None
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    # A linear layer of the model's own making is none to PEFT: it returns more than its product (a router of experts).
    others = [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and type(part).__module__ == type(model).__module__
    ]
    arguments = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=others if lora.target_modules == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):  # shapes without memory
        skeleton = type(model)(copy.deepcopy(model.config))
        try:
            adapted = peft.get_peft_model(skeleton, copy.deepcopy(arguments))
        except (ValueError, re.error) as error:
            linear = (torch.nn.Linear, Conv1D)
            names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, linear)}
            raise InputError(
                f"lora.target_modules: {lora.target_modules!r} does not fit {type(model).__name__}: {error} "
                f"Expected 'all-linear', or some of {', '.join(sorted(names))}."
            ) from None
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            f"lora.target_modules: {lora.target_modules!r} has the output layer, which TRL's losses cannot train "
            "through an adapter: leave it out"
        )
    return arguments

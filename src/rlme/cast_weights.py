"""Weights in another precision for a while: sampling, and judging by what samples, in bfloat16 of float32 weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from rlme.tree_attention import PASS_ERRORS, causal_lm, device_of, evaluating

_works: WeakKeyDictionary[PreTrainedModel, dict[torch.dtype, bool]] = WeakKeyDictionary()


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the model's float32 weights are copies cast to `dtype`; the optimizer's tensors are not
    touched.

    The parameters are replaced rather than their data cast: that would detach the gradient hooks of DDP.
    Buffers (rotary frequencies) keep their precision. A model that does not work so keeps its weights, with a warning.
    """
    known = _works.setdefault(causal_lm(model), {})
    with ExitStack() as stack:
        if dtype is not None and known.get(dtype, True):
            stack.enter_context(_cast(model, dtype))
            if dtype not in known:
                known[dtype] = _works_cast(model, dtype)
                if not known[dtype]:
                    stack.close()
        yield


def _works_cast(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a token goes through the model, whose weights are cast. Some multiply them with their buffers."""
    inner = causal_lm(model)
    try:
        with torch.no_grad(), evaluating(model):
            inner(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device_of(inner)), use_cache=False)
    except PASS_ERRORS as error:
        warnings.warn(
            f"{type(inner).__name__}: sampling keeps the precision of its weights (correct, but slower): "
            f"in {dtype} it fails: {error}",
            stacklevel=4,
        )
        return False
    return True


@contextmanager
def _cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    cast: dict[int, nn.Parameter] = {}
    try:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter.dtype == torch.float32 and dtype != torch.float32:
                    if id(parameter) not in cast:
                        cast[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                    setattr(module, name, cast[id(parameter)])
                    replaced.append((module, name, parameter))
        yield
    finally:
        for module, name, parameter in replaced:
            setattr(module, name, parameter)

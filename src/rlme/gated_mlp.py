"""Gated MLPs that keep less for the backward pass: their inner activations are computed again when it wants them.

Of an MLP `down(act(gate(x)) * up(x))`, autograd keeps gate's and up's outputs, the activated gate and the product: four
tensors of the inner width, more than half of what a Llama-like layer keeps. The last two follow from the first two by
elementwise arithmetic, so they are not kept. (Gradient checkpointing keeps less still, but computes every product of a
layer again.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rlme.tree_attention import PASS_ERRORS

LAYERS = ("gate_proj", "up_proj", "down_proj")

_follow: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def recomputed_gates(model: nn.Module) -> Iterator[None]:
    """What the model's gated MLPs compute with gradient inside keeps two tensors of the inner width instead of four.

    Outputs and gradients are the same to the last bit, whatever the layers are (adapters, quantised or sharded
    weights): only the activation function and the product are computed twice. MLPs of another form are left alone, and
    so are all under gradient checkpointing, which keeps none of the four.
    """
    changed: list[nn.Module] = []
    modules = list(model.modules())
    if any(getattr(module, "gradient_checkpointing", False) for module in modules):
        modules = []
    try:
        for module in modules:
            if _is_gated(module):
                module.forward = partial(_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _is_gated(module: nn.Module) -> bool:
    if "forward" in vars(module) or not all(isinstance(getattr(module, name, None), nn.Module) for name in LAYERS):
        return False
    if module not in _follow:
        _follow[module] = _follows(module)
    return _follow[module]


def _follows(mlp: nn.Module) -> bool:
    """Whether it computes what `_forward` does, of its layers and nothing else: tried with others in their place."""
    activation = getattr(mlp, "act_fn", None)
    layers = SimpleNamespace(act_fn=activation, gate_proj=lambda x: x / 2, up_proj=torch.cos, down_proj=torch.exp)
    x = torch.linspace(-3, 3, 64)
    try:
        with torch.no_grad():
            return torch.equal(cast(Any, type(mlp).forward)(layers, x), _forward(layers, x))
    except (AttributeError, *PASS_ERRORS):
        return False


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    act, kept_gate, kept_up = mlp.act_fn, gate.detach(), up.detach()
    activated = act(gate)
    with _not_kept(activated, lambda: act(kept_gate)):
        product = activated * up
    del activated
    with _not_kept(product, lambda: act(kept_gate) * kept_up):
        return cast(Tensor, mlp.down_proj(product))


def _not_kept(tensor: Tensor, compute: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Inside, where autograd would keep `tensor` or a view of all of it, it keeps what computes it again.

    `tensor` has to live until the end: it is known by its address.
    """
    device = tensor.device.type
    precision = torch.autocast(device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
    kept = tensor.data_ptr(), tensor.numel(), tensor.dtype  # autograd holds `pack`, so it must not hold the tensor
    whole = tensor.is_contiguous()

    def pack(saved: Tensor) -> Any:
        if whole and (saved.data_ptr(), saved.numel(), saved.dtype) == kept:
            return partial(again, saved.size(), saved.stride())
        return saved

    def again(size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        with torch.no_grad(), precision:
            return compute().as_strided(size, stride)

    return saved_tensors_hooks(pack, lambda packed: packed() if isinstance(packed, partial) else packed)

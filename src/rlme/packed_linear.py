"""Linear layers for decoding on a CPU: their weights in the order in which oneDNN reads them.

A product of a few rows with a bfloat16 weight spends a good part of its time on putting the weight into that order, at
every call. While completions are sampled the weights do not change, so it is done once. The results are the same to
the last bit; 32 rows of a 135M model sample 15 to 20 % faster. Narrow layers (an adapter's rank) are left alone: there
is nothing to gain, and PyTorch adds up products of up to 16 outputs in another order now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

NARROW = 32  # outputs


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the model's linear layers in bfloat16 on a CPU multiply with packed copies of their weights, which take
    the weights' memory once more.

    Not to be entered where gradients are wanted or weights change. A layer whose forward pass is not `nn.Linear`'s
    keeps it, so does a narrow one, and so do all where PyTorch has no such product.
    """
    packed: list[nn.Linear] = []
    try:
        for module in model.modules():
            # Only the class itself: what derives from it may read the weight in ways of its own.
            if type(module) is nn.Linear and "forward" not in vars(module) and _packs(module.weight):
                module.forward = _packed_forward(module)  # type: ignore[assignment,method-assign]
                packed.append(module)
        yield
    finally:
        for module in packed:
            del module.forward


def _packs(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and len(weight) >= NARROW and _available()


@cache
def _available() -> bool:
    """Whether this build of PyTorch has the product, which is not part of its public interface, and it is right."""
    weight = torch.linspace(-1, 1, 24 * 16).view(24, 16).bfloat16()
    x = torch.linspace(-2, 1, 5 * 16).view(5, 16).bfloat16()
    try:
        return bool(torch.allclose(_multiply(x, _pack(weight), None), nn.functional.linear(x, weight), atol=0.05))
    except (AttributeError, RuntimeError):
        return False


def _pack(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = _pack(linear.weight)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:  # autocast's to convert, or an error to be told in PyTorch's words
            return nn.functional.linear(x, linear.weight, linear.bias)
        return _multiply(x, packed, linear.bias)

    return forward

"""A batch in packs, each of them one forward-backward pass: what makes the passes add up to the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# How a pack's loss adds up to the batch's, by TRL's `loss_type`: these already divide by the whole batch's tokens;
# the others are means over the pack's sequences (or, bnpo, tokens).
_SUMS = ("cispo", "dapo", "vespo")

Metrics = dict[str, list[float]]


def rows_of(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """These rows of every per-row tensor; scalars (the batch's token count) stay as they are."""
    n = len(inputs["completion_ids"])
    return {
        key: value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n else value
        for key, value in inputs.items()
    }


def share_of_batch(loss_type: str, *, rows: float, tokens: float) -> float:
    """The factor that makes the packs' losses add up to the batch's, for a pack with these shares of its rows and
    tokens."""
    if loss_type in _SUMS:
        return 1.0
    return tokens if loss_type == "bnpo" else rows


def as_many_as_others(packs: list[list[int]], accelerator: Any) -> list[list[int]]:
    """As many packs in every process, the largest halved where there are fewer: sharded weights are waited for in each
    pass."""
    packs = list(packs)
    most = int(accelerator.gather(torch.tensor([len(packs)], device=accelerator.device)).max())
    while len(packs) < most:
        largest = max(packs, key=len)
        packs.remove(largest)
        packs += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return packs


@contextmanager
def apart(accelerator: Any) -> Iterator[None]:
    """Inside, what TRL logs of a pass is of this process: the passes of several have different rows."""
    accelerator.gather = accelerator.gather_for_metrics = lambda tensor, *args, **kwargs: tensor
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def merge_metrics(metrics: Metrics, first: dict[str, int], tokens: Sequence[int]) -> None:
    """Make one value of those that the packs appended after `first` of each, so that packing does not change what is
    logged."""
    for name, values in metrics.items():
        new = values[first.get(name, 0) :]
        if len(new) == len(tokens) > 1:
            values[first.get(name, 0) :] = [_merged(name, new, tokens)]


def gather_metrics(metrics: Metrics, first: dict[str, int], accelerator: Any) -> None:
    """Make the values that this process has appended after `first` those of all."""
    names = sorted(name for name, values in metrics.items() if len(values) > first.get(name, 0))
    mine = torch.tensor([[metrics[name][-1] for name in names]], device=accelerator.device)
    for name, values in zip(names, accelerator.gather(mine).T.tolist(), strict=True):
        metrics[name][-1] = _merged(name, values, [1] * len(values))


def _merged(name: str, values: Sequence[float], weights: Sequence[int]) -> float:
    """The weighted mean, or the extreme, by name."""
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(1, sum(weights))

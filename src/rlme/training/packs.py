"""A batch in packs, each of them one forward-backward pass: what makes the passes add up to the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import split_tensor_dict

from rlme.processes import everywhere

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


def dealt_in_groups(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of these micro-batches in as many of the same size, those of one prompt together."""
    whole = {
        key: torch.cat([part[key] for part in parts]) if isinstance(value, torch.Tensor) and value.ndim else value
        for key, value in parts[0].items()
    }
    prompts = whole["prompt_ids"].tolist()
    rows = sorted(range(len(prompts)), key=prompts.__getitem__)
    dealt: list[dict[str, Any]] = split_tensor_dict(rows_of(whole, rows), len(parts))
    return dealt


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
    names = ("gather", "gather_for_metrics", "reduce")
    for name in names:
        setattr(accelerator, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


def merge_metrics(
    metrics: Metrics,
    first: dict[str, int],
    *,
    tokens: Sequence[int],
    rows: Sequence[int],
    by_row: bool,
    accelerator: Any,
) -> None:
    """Make one value, of the whole batch in all processes, of those that the passes appended after `first` of each.

    `tokens` and `rows` of each pass are the weights of means: TRL's are over tokens, those of ratios that a row has one
    of (`by_row`) over rows.
    """
    names = sorted(name for name, values in metrics.items() if len(values) - first.get(name, 0) == len(tokens))
    found: dict[str, list[tuple[float, int]]] = {}
    for name in names:
        weights = rows if name.startswith("vespo/") or (by_row and "clip" in name) else tokens
        found[name] = list(zip(metrics[name][first.get(name, 0) :], weights, strict=True))
    everywhere_found = everywhere([found], accelerator)
    for name in names:
        metrics[name][first.get(name, 0) :] = [_merged(name, [pair for one in everywhere_found for pair in one[name]])]


def _merged(name: str, values: Sequence[tuple[float, int]]) -> float:
    """The extreme or, weighted, the mean, by name."""
    if name.endswith("_min"):
        return min(value for value, _ in values)
    if name.endswith("_max"):
        return max(value for value, _ in values)
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values if weight) / total if total else values[0][0]

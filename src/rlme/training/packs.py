"""A batch in packs, each of them one forward-backward pass: what makes the passes add up to the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import split_tensor_dict

from rlme.key_values import HELD_FROM, HeldPrefix
from rlme.prefix_tree import shared_length
from rlme.processes import everywhere
from rlme.scoring import plan_rows
from rlme.sharing import may_train_held

# How a pack's loss adds up to the batch's, by TRL's `loss_type`: these already divide by the whole batch's tokens;
# the others are means over the pack's sequences (or, bnpo, tokens).
_SUMS = ("cispo", "dapo", "vespo")

Metrics = dict[str, list[float]]


Group = tuple[tuple[int, ...], list[int]]  # a prompt, and its rows


@dataclass(slots=True)
class Pack:
    """Rows of one forward-backward pass."""

    rows: list[int]
    prefix: Tensor | None = None
    """What this pass and those that follow up to a `last` one begin with, where they are several."""
    last: bool = False
    """The pass that reads the prefix for those before it."""


def plan(
    model: nn.Module, prompts: Sequence[Tensor], completions: Sequence[Tensor], token_budget: int, *, hold: bool
) -> list[Pack]:
    """Packs of at most `token_budget` tokens, groups together.

    `hold`: what is too much for one pass and begins alike (a group that is larger, groups behind the same worked
    examples) is computed in several passes which read that beginning once, where the model allows it (dropout, which
    draws anew in each pass, does not); otherwise each of them reads it.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.tolist()), []).append(row)
    own = [max(0, len(answer) - 1) for answer in completions]  # the last token is only read
    alike = _alike(groups, own, token_budget) if hold else []
    if alike:
        _, members = alike[0]
        sequences = [(*ids, *completions[row].tolist()) for ids, rows in members for row in rows]
        alike = alike if may_train_held(model, sequences) else []
    packs: list[Pack] = []
    for length, members in alike:
        chain = _cut(length, members, own, token_budget)
        if len(chain) > 1:
            prefix = prompts[chain[0][0]][:length]
            packs += [*(Pack(some, prefix) for some in chain[1:]), Pack(chain[0], prefix, last=True)]
            for ids, _ in members:
                del groups[ids]
    rest = [row for rows in groups.values() for row in rows]
    if rest:
        whole = plan_rows(model, [prompts[row] for row in rest], [completions[row] for row in rest], token_budget)
        packs += [Pack([rest[i] for i in some]) for some in whole]
    return packs


def _alike(
    groups: dict[tuple[int, ...], list[int]], own: Sequence[int], token_budget: int
) -> list[tuple[int, list[Group]]]:
    """What shares a prefix that is worth holding and does not fit into one pass: the prefix's length, and the groups.

    The last token of a prompt is no part of it: its hidden state is wanted in each pass. `own[row]` is how many tokens
    of its completion a row computes.
    """
    sizes = {ids: len(ids) + sum(own[row] for row in rows) for ids, rows in groups.items()}
    found: list[tuple[int, list[Group]]] = []
    before: tuple[int, ...] = ()
    for ids in sorted(groups):
        length, members = found[-1] if found else (0, [])
        shared = min(shared_length(before, ids), max(0, len(before) - 1))
        # A group that needs several passes by itself goes on from what is held in each of them: from its own prompt,
        # if most of that is its own. What many share much of is not held less of for one that shares little.
        large = max(sizes[ids], sizes.get(before, 0)) > token_budget
        least = max(HELD_FROM, max(len(before), len(ids)) / 2 if large else 0, length / 2 if len(members) > 1 else 0)
        if shared >= least:
            found[-1] = min(length, shared), [*members, (ids, groups[ids])]
        else:
            found.append((len(ids) - 1, [(ids, groups[ids])]))
        before = ids
    return [
        (length, members)
        for length, members in found
        if length >= HELD_FROM and length + sum(sizes[ids] - length for ids, _ in members) > token_budget
    ]


def _cut(length: int, members: Sequence[Group], own: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows of each pass over groups that begin with the same `length` tokens: the first pass reads these, the others
    go on from there. Groups are together where they fit."""
    chain: list[list[int]] = [[]]
    used = length
    for ids, rows in members:
        rest = len(ids) - length  # of the prompt, read in each pass that has a row of the group
        whole = rest + sum(own[row] for row in rows)
        if chain[-1] and used + whole > token_budget >= whole:
            chain.append([])
            used = 0
        cost = rest
        for row in rows:
            if chain[-1] and used + cost + own[row] > token_budget:
                chain.append([])
                used, cost = 0, rest
            chain[-1].append(row)
            used += cost + own[row]
            cost = 0
    return chain


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


def with_prefixes(
    packs: Sequence[Pack], read: Callable[[Tensor], HeldPrefix]
) -> Iterator[tuple[Pack, HeldPrefix | None]]:
    """The packs, and what several of them share: read before the first of them, let go after the last."""
    held: HeldPrefix | None = None
    for pack in packs:
        if pack.prefix is not None and held is None:
            held = read(pack.prefix)
        yield pack, held
        if pack.last:
            held = None


def as_many_as_others(packs: list[Pack], accelerator: Any) -> list[Pack]:
    """As many packs in every process, the largest halved where there are fewer: their metrics are put together."""
    packs = list(packs)
    most = int(accelerator.gather(torch.tensor([len(packs)], device=accelerator.device)).max())
    while len(packs) < most:
        at = max(range(len(packs)), key=lambda i: len(packs[i].rows))
        largest, middle = packs[at], len(packs[at].rows) // 2
        halves = replace(largest, rows=largest.rows[:middle], last=False), replace(largest, rows=largest.rows[middle:])
        packs[at : at + 1] = halves
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

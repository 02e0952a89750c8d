"""Prompts read into a cache: what they share is computed once, packed and not padded, a few thousand tokens at a time.

Prompts often begin alike (a system prompt, worked examples), and differ in length. The passes are those of the loss and
of judging (`rlme.prefix_tree`); what they compute is written where each prompt has its place in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlme.forward import in_turn, length_kind, plan_passes
from rlme.prefix_tree import Ints
from rlme.sharing import may_hold
from rlme.tree_attention import TreeInputs, device_of

PASS_TOKENS = 8192  # of one pass: as few as keep a GPU busy


class _Places:
    """Where the tokens of some prompts stand in a pass, and where they go in the cache: row and column."""

    def __init__(
        self,
        layers: Sequence[Any],
        numbers: Sequence[int],
        paths: Sequence[Ints],
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.shape = shape
        longest = shape[1]
        taken = np.concatenate(paths)
        rows = np.repeat(np.array(numbers), [len(path) for path in paths])
        columns = np.concatenate([np.arange(longest - len(path), longest) for path in paths])
        self.taken, self.rows, self.columns = (torch.from_numpy(x).to(device) for x in (taken, rows, columns))

    def keep(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Write those of layer n, out of a pass's [1, K, S, d]."""
        keys, values = (x[0].transpose(0, 1).index_select(0, self.taken) for x in (keys, values))
        self.layers[number].write(self.shape, self.rows, self.columns, keys, values)


@torch.no_grad()
def read_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: DynamicCache) -> Tensor:
    """Fill an empty cache of roomy layers (`rlme.prompt_groups`) with P different prompts, padded on the left, for a
    model that takes our attention. Returns the logits [P, V] of the token after each."""
    device = device_of(model)
    hold = may_hold(model, prompts, PASS_TOKENS)
    packs = plan_passes(prompts, PASS_TOKENS, share=True, kind=length_kind(model), hold=hold)
    last = [len(prompt) - 1 for prompt in prompts]
    shape = len(prompts), max(map(len, prompts))
    logits: list[Tensor] = []
    for pack, held, places, keep in in_turn(prompts, packs, last, hold=hold):
        tree = TreeInputs([prompts[n] for n in pack], device, held, places, keep=keep)
        tree.layout.keepers.append(_Places(cache.layers, pack, tree.places, shape, device))
        ends = torch.tensor([int(path[-1]) for path in tree.paths], device=device)
        logits.append(model(**tree.kwargs, logits_to_keep=ends).logits[0])
    order = torch.tensor([n for pack in packs for n in pack], device=device)
    return torch.cat(logits)[order.argsort()]

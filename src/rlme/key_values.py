"""Keys and values that were computed once, kept for passes that need not compute them again.

`KeyValues`: a `live` evaluator reads the policy's own prompt and completion with the weights that have just written
them. What the cache held at that moment is what a forward pass over the same tokens would compute, as long as weights,
dtype and tokens are the same. `HeldPrefix`: what shares a prefix is more than one pass may hold, so one reads the
prefix for all. `rlme.tree_attention` lets tokens attend to either.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlme.prefix_tree import Ints, shared_length

LIMIT = 1 << 30  # bytes; completions beyond it are computed again
HELD_FROM = 32  # tokens of a shared prefix from which on holding it for the next pass takes less time than reading it


class KeyValues:
    """Keys and values of N tokens per layer, and the token sequences they belong to.

    `keys[layer]`, `values[layer]`: [N, K, d] with K key-value heads, rotated by their positions. `positions[N]`.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.tokens = 0
        self.positions: Ints = np.empty(0, np.int64)
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._prompts: dict[tuple[int, ...], Ints] = {}
        self._sequences: list[tuple[tuple[int, ...], Ints]] = []  # tokens, and where each of them is held

    def hold(
        self,
        layers: int,
        read: Callable[[int], tuple[Tensor, Tensor]],
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        begin: int,
    ) -> None:
        """Copy R rows of a cache: `rows` are their prompts, and the completion tokens the cache has seen.

        `read(n)` gives keys and values [R, K, L, d] of layer n: prompts padded on the left to `begin` tokens, then
        completions. Rows that would exceed the limit are left out.
        """
        keys, _ = read(0)
        per_token = 2 * layers * keys.shape[1] * keys.shape[3] * keys.element_size()
        batch: list[Ints] = []
        columns: list[Ints] = []
        positions = [self.positions]
        for row, (prompt, own) in enumerate(rows):
            known = self._prompts.get(tuple(prompt))
            first = 0 if known is None else len(prompt)  # the first position that is new
            new = len(prompt) + len(own) - first
            if (self.tokens + new) * per_token > self.limit:
                continue
            place = np.arange(self.tokens, self.tokens + new)
            path = place if known is None else np.concatenate([known, place])
            if known is None:
                self._prompts[tuple(prompt)] = path[: len(prompt)]
            batch.append(np.full(new, row))
            columns.append(np.arange(begin - len(prompt) + first, begin + len(own)))
            positions.append(np.arange(first, len(path)))
            self._sequences.append(((*prompt, *own), path))
            self.tokens += new
        if not batch:
            return
        self.positions = np.concatenate(positions)
        index = tuple(torch.from_numpy(np.concatenate(x)).to(keys.device) for x in (batch, columns))
        for number in range(layers):
            keys, values = read(number)
            piece = keys[index[0], :, index[1]], values[index[0], :, index[1]]
            self._pieces.setdefault(number, []).append(piece)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, K, d] of one layer."""
        pieces = self._pieces[number]
        if len(pieces) > 1:
            keys, values = zip(*pieces, strict=True)
            self._pieces[number] = pieces = [(torch.cat(keys), torch.cat(values))]
        return pieces[0]

    def find(self, sequences: Sequence[Sequence[int]]) -> list[Ints]:
        """For each sequence: where the longest held prefix of it lies, token by token."""
        held = sorted(self._sequences, key=lambda pair: pair[0])
        tokens = [pair[0] for pair in held]
        found = []
        for sequence in sequences:
            # What shares most with a sequence stands next to where it would be sorted in.
            after = bisect(tokens, tuple(sequence))
            near = [i for i in (after - 1, after) if 0 <= i < len(held)]
            lengths = {i: shared_length(tokens[i], sequence) for i in near}
            best = max(near, key=lambda i: lengths[i], default=None)
            found.append(np.empty(0, np.int64) if best is None else held[best][1][: lengths[best]])
        return found


class HeldPrefix:
    """Keys and values of a text's first N tokens, from the pass that reads them to those that go on from there.

    `positions`[N] are 0 to N - 1. With `gradient` they take part in backward passes: each adds what it wants changed
    in them, and the last pass reads the prefix again and passes all that on (`give_back`), so that the passes together
    have the gradient of one.
    """

    def __init__(self, text: Sequence[int], *, gradient: bool = False) -> None:
        self.text = tuple(text)
        self.tokens = len(self.text)
        self.positions: Ints = np.arange(self.tokens)
        self.gradient = gradient
        self.where: Tensor | None = None
        """Where in the pass that reads them they are, [N]."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def places(self, sequence: Sequence[int], stop: int) -> Ints:
        """Where the first tokens of a sequence are held, of those before `stop`."""
        return self.positions[: min(shared_length(self.text, sequence), stop)]

    def keep(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Take those of layer n out of a pass's, [1, K, S, d]."""
        kept = (x[0].index_select(1, cast(Tensor, self.where)).transpose(0, 1).detach() for x in (keys, values))
        # What several passes add up is added in float32.
        k, v = (x.float().requires_grad_() if self.gradient else x for x in kept)
        self._layers[number] = k, v

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, K, d] of one layer."""
        return self._layers[number]

    def leaves(self) -> list[Tensor]:
        """All of them, which backward passes leave their gradient at."""
        return [x for layer in self._layers.values() for x in layer]

    def give_back(self, number: int, keys: Tensor, values: Tensor) -> None:
        """Let the gradient of a pass's keys and values [1, K, S, d], of which the first N are these, be that of all
        passes."""
        for x, held in zip((keys, values), self._layers[number], strict=True):
            if x.requires_grad and held.grad is not None:  # below the first layer that is trained, none has
                x.register_hook(partial(self._and_owed, held.grad.transpose(0, 1)[None]))

    def _and_owed(self, owed: Tensor, found: Tensor) -> Tensor:
        return torch.cat([(found[:, :, : self.tokens] + owed).to(found.dtype), found[:, :, self.tokens :]], 2)

"""Rows that are being written: what comes after their last token, whatever a model keeps of the tokens before it.

`begin` picks the way. Where the model has a cache of keys and values (or of states) that rows can be copied in, each
prompt is read once, and a step reads one token of each row. Where it has none, or gives other numbers with it than
without, a step reads the rows from their beginning: slow, and right.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlme.key_values import KeyValues
from rlme.prefill import read_prompts
from rlme.prompt_groups import (
    CHECK_TOKENS,
    RoomyLayer,
    difference_of_draws,
    may_attend,
    prompt_rows,
    roomy_cache,
    step_inputs,
)
from rlme.tree_attention import PASS_ERRORS, device_of

_ways: WeakKeyDictionary[PreTrainedModel, Literal["padded", "even", "whole"]] = WeakKeyDictionary()


class CachedRows:
    """R rows that begin with `prompts`, each different one read once. `ours`: with our attention (`may_attend`).

    `logits`[R, V] are those of the next token, also after each `step`.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, ours: bool) -> None:
        self.model = model
        device = device_of(model)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: i for i, prompt in enumerate(unique)}
        copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        self.longest = max(map(len, unique))
        mask = torch.tensor([[0] * (self.longest - len(p)) + [1] * len(p) for p in unique], device=device)
        self.cache = roomy_cache(model)
        # State-space models (Mamba): their states hold what a mask would say again at each step.
        self.states = "cache_params" in inspect.signature(model.forward).parameters
        self.read = {"cache_params" if self.states else "past_key_values": self.cache, "use_cache": True}
        if ours:
            logits = read_prompts(model, unique, self.cache)
        else:
            logits = model(
                input_ids=left_padded(unique, device),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                **self.read,
                # An index instead of a slice: a head on a slice multiplies a copy of its weights for each row.
                logits_to_keep=torch.tensor([self.longest - 1], device=device),
            ).logits[:, -1]
        self.ours = prompt_rows(self.cache, mask, copies) if ours else None
        if self.ours is None:
            self.cache.reorder_cache(cast(torch.LongTensor, copies))
        self.logits: Tensor = logits[copies]
        self.mask = mask[copies]
        self.positions = self.mask.sum(1)

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row, `tokens`[R]."""
        if self.ours is not None:
            inputs = step_inputs(self.ours)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            inputs = {} if self.states else {"attention_mask": self.mask}
        self.logits = self.model(
            input_ids=tokens[:, None],
            **inputs,
            position_ids=self.positions[:, None],
            **self.read,
            logits_to_keep=1,
        ).logits[:, -1]
        self.positions = self.positions + 1

    def select(self, stay: Tensor) -> None:
        """Go on with these rows, from the next step on."""
        self.cache.reorder_cache(cast(torch.LongTensor, stay))
        if self.ours is not None:
            self.ours.select(stay)
        self.mask, self.positions = self.mask[stay], self.positions[stay]

    def hold(self, keep: KeyValues, leaving: Tensor, members: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Let `keep` have the keys and values of some rows, whose prompts and further tokens are `members`, where the
        cache holds them whole (not those of sliding windows)."""
        if any(not isinstance(layer, RoomyLayer) for layer in self.cache.layers):
            return

        def read(number: int) -> tuple[Tensor, Tensor]:
            if self.ours is not None:
                return self.ours.whole(number, leaving)
            layer = self.cache.layers[number]
            return cast(Tensor, layer.keys)[leaving], cast(Tensor, layer.values)[leaving]

        keep.hold(len(self.cache.layers), read, members, self.longest)


class RecomputedRows:
    """R rows that begin with `prompts`, read from their beginning at each step, padded on the right.

    `logits`[R, V] are those of the next token, also after each `step`.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.rows = [list(prompt) for prompt in prompts]
        self.logits = self._read()

    def _read(self) -> Tensor:
        device = device_of(self.model)
        lengths = torch.tensor([len(row) for row in self.rows], device=device)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in self.rows], True)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[torch.arange(len(ids), device=device), lengths - 1]

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row, `tokens`[R]."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self.logits = self._read()

    def select(self, stay: Tensor) -> None:
        """Go on with these rows, from the next step on."""
        self.rows = [self.rows[i] for i in stay.tolist()]

    def hold(self, keep: KeyValues, leaving: Tensor, members: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """There are no keys and values to keep."""


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [P, L], padded with a token of the prompt itself: a repetition penalty finds nothing new in it."""
    longest = max(map(len, prompts))
    return torch.tensor([[p[0]] * (longest - len(p)) + list(p) for p in prompts], device=device)


def begin(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> CachedRows | RecomputedRows:
    """Rows that continue the prompts, in the fastest way that is right for the model. Prompts of different length only
    where `mixes_lengths`."""
    longest = max(prompts, key=len)
    way = _way(model, longest)
    return RecomputedRows(model, prompts) if way == "whole" else CachedRows(model, prompts, ours=way == "ours")


def mixes_lengths(model: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Whether prompts of different length can be read together, the shorter ones padded."""
    return _way(model, prompt) != "even"


@torch.no_grad()
def _way(model: PreTrainedModel, prompt: Sequence[int]) -> Literal["ours", "padded", "even", "whole"]:
    """Ours: with our attention. Else with the model's own and its own cache: of padded prompts, or of prompts of even
    length. Else whole rows, again and again. What gives other numbers than whole rows is ruled out, once."""
    if may_attend(model, prompt):
        return "ours"
    if model not in _ways:
        prompt = list(prompt)[-CHECK_TOKENS:]
        shorter = prompt[: max(1, len(prompt) * 2 // 3)]
        reason = _disagreement(model, [prompt, shorter, prompt])
        way: Literal["padded", "even", "whole"] = "padded"
        if reason is not None:
            way = "even"
            reason = _disagreement(model, [prompt, [*prompt[:-1], prompt[0]], prompt])
        if reason is not None:
            way = "whole"
            warnings.warn(
                f"{type(model).__name__}: for each token that is sampled, its whole text is read again (correct, but "
                f"slower): {reason}",
                stacklevel=2,
            )
        _ways[model] = way
    return _ways[model]


def _disagreement(model: PreTrainedModel, rows: list[list[int]]) -> str | None:
    """Compare two steps of three rows with those of whole rows, before and after a row left."""
    first, second = (
        torch.tensor([row[i] for row in (*rows[:2], rows[2][::-1])], device=device_of(model)) for i in (0, -1)
    )
    stay = torch.tensor([2, 1], device=device_of(model))

    def steps(writing: CachedRows | RecomputedRows) -> Tensor:
        logits = [writing.logits]
        writing.step(first)
        logits.append(writing.logits)
        writing.select(stay)
        writing.step(second[stay])
        return torch.cat([*logits, writing.logits])

    expected = steps(RecomputedRows(model, rows))
    try:
        return difference_of_draws(model, expected, steps(CachedRows(model, rows, ours=False)))
    except (*PASS_ERRORS, AttributeError, LookupError) as error:
        return f"its cache does not hold rows as ours do: {error}"

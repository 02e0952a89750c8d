"""The cache of grouped sampling: rows that continue prompts which were read once, and their attention.

While R rows are written, each attends to its own prompt and to what it has written itself. A long prompt is held once
for all its rows (`PromptGroups`): they read it together, as one matrix product, and a softmax over both parts joins the
two. A short one is copied into every row's cache (`PromptCopies`): one product over prompt and own tokens then takes
less time than two that have to be joined. Where a model lets us do neither (`may_attend`), every row gets its copy in
transformers' own cache, and the model's own attention reads it, which on a CPU takes several times as long.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlme.prefill import read_prompts
from rlme.tree_attention import (
    PASS_ERRORS,
    attention_of,
    device_of,
    difference,
    install,
    tree_unsupported_reason,
)

GROWTH = 32  # tokens of room added when a cache layer is full: all of it is read at each step
COPIED = 256  # tokens of a prompt up to which a copy for each row is faster (32 rows on a CPU: up to 400)
CHECK_TOKENS = 256  # a model's first use compares all ways on a prompt of at most this length

_checked: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full-attention cache layer with spare room: a new token is written without copying those held."""

    room: tuple[Tensor, Tensor] | None = None  # keys and values, [R, heads, length and more, d]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [R, heads, T, d] and return everything held, as views."""
        held = self.get_seq_length()
        stop = held + key_states.shape[2]
        if self.room is None or self.room[0].shape[2] < stop:
            before: tuple[Tensor | None, Tensor | None] = (self.keys, self.values)  # type: ignore[has-type]
            shape = (*key_states.shape[:2], stop + GROWTH, key_states.shape[3])
            self.room = (
                key_states.new_zeros(shape),
                value_states.new_zeros((*shape[:3], value_states.shape[3])),
            )
            for room, kept in zip(self.room, before, strict=True):
                if kept is not None:
                    room[:, :, :held] = kept
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        self.is_initialized = True
        return self.keys, self.values

    def write(self, shape: tuple[int, int], rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys`, `values`[N, K, d] at these rows and columns of P rows of L tokens, in a layer that is empty but
        for what was put there before. Other places are 0."""
        if self.room is None:
            count, length = shape
            self.lazy_initialization(keys, values)
            self.room = tuple(x.new_zeros((count, x.shape[1], length + GROWTH, x.shape[2])) for x in (keys, values))  # type: ignore[assignment]
            self.keys, self.values = (room[:, :, :length] for room in cast(tuple[Tensor, Tensor], self.room))
        for room, new in zip(cast(tuple[Tensor, Tensor], self.room), (keys, values), strict=True):
            room[rows, :, columns] = new

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep (or repeat) these rows; they move out of the room."""
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]
        self.room = None


class _OwnLayer(RoomyLayer):
    """What each of R rows has for itself, at first `keys` and `values`[R, heads, L, d]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the whole room: products over a part of it would copy that part first."""
        super().update(key_states, value_states)
        return cast(tuple[Tensor, Tensor], self.room)


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for a model: its layers of full attention are roomy, the others transformers' own."""
    cache = DynamicCache(config=model.config)
    layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    cache.layers = layers
    return cache


def prompt_rows(cache: DynamicCache, mask: Tensor, prompt_of: Tensor) -> PromptGroups | PromptCopies:
    """Let rows continue the prompts that `cache` has read, in the way that is faster for their length and number."""
    long = mask.shape[1] > COPIED and len(prompt_of) > len(mask)
    return (PromptGroups if long else PromptCopies)(cache, mask, prompt_of)


class PromptCopies:
    """R rows, each with its prompt and what it has written itself in one piece of cache.

    `cache` has read the prompts, padded on the left; it is left with a copy for each row. `mask`[P, L] is 0 at padding.
    `prompt_of`[R]: the prompt of each row.
    """

    def __init__(self, cache: DynamicCache, mask: Tensor, prompt_of: Tensor) -> None:
        held = ((cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in cache.layers)
        self.own = [_OwnLayer(keys[prompt_of], values[prompt_of]) for keys, values in held]
        cache.layers = list(self.own)
        self.hidden = ~mask.bool()[prompt_of]
        self._mask: tuple[Any, Tensor] | None = None

    def select(self, stay: Tensor) -> None:
        """Go on with these rows."""
        self.hidden = self.hidden[stay]
        self._mask = None

    def _additive(self, shape: tuple[int, int, int, int], held: int, dtype: torch.dtype) -> Tensor:
        """[R * K, H/K, room]: -inf at padding and at room that is not written yet; made once for all layers."""
        key = shape, held, dtype
        if self._mask is None or self._mask[0] != key:
            rows, kinds, _, room = shape
            mask = torch.zeros((rows, 1, 1, room), dtype=dtype, device=self.hidden.device)
            mask[..., : self.hidden.shape[1]].masked_fill_(self.hidden[:, None, None], float("-inf"))
            mask[..., held:] = float("-inf")
            self._mask = key, mask.expand(shape).reshape(rows * kinds, -1, room)
        return self._mask[1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one token per row, `query`[R, H, 1, d], over `key`, `value`: the room of the layer,
        [R, K, room, d], of which what is written counts.

        Returns [R, 1, H, d]. The heads that share keys are one matrix.
        """
        rows, kinds, room, dim = key.shape
        query = query.to(key.dtype).reshape(rows * kinds, -1, dim)
        mask = self._additive((rows, kinds, query.shape[1], room), self.own[layer].get_seq_length(), query.dtype)
        keys = key.flatten(0, 1).transpose(1, 2)
        scores = torch.baddbmm(mask, query, keys, alpha=dim**-0.5 if scaling is None else scaling)
        weights = scores.softmax(-1).to(value.dtype)
        return torch.bmm(weights, value.flatten(0, 1)).view(rows, 1, -1, value.shape[3])

    def whole(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, K, L, d] of one layer."""
        own = self.own[layer]
        return own.keys[rows], own.values[rows]


class PromptGroups:
    """P prompts that R rows continue: the prompts' keys and values, and who continues which.

    `cache` has read the prompts, padded on the left; their keys and values move here, and it is left with what the
    rows write. `mask`[P, L] is 0 at padding. `prompt_of`[R]: the prompt of each row.
    """

    def __init__(self, cache: DynamicCache, mask: Tensor, prompt_of: Tensor) -> None:
        # Without the room behind them, which products would copy them out of at each step.
        held = ((cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in cache.layers)
        self.prompts = [(keys.contiguous(), values.contiguous()) for keys, values in held]
        shapes = ((len(prompt_of), keys.shape[1], 0) for keys, _ in self.prompts)
        self.own = [
            _OwnLayer(*(x.new_empty((*shape, x.shape[3])) for x in prompt))
            for shape, prompt in zip(shapes, self.prompts, strict=True)
        ]
        cache.layers = list(self.own)
        self.mask = mask.bool()
        self._arrange(prompt_of)

    def _arrange(self, prompt_of: Tensor) -> None:
        self.prompt_of = prompt_of
        self.hidden = None if bool(self.mask.all()) else ~self.mask[:, None, None]
        self._places: dict[int, tuple[Tensor, Tensor]] = {}

    def _layout(self, kinds: int) -> tuple[Tensor, Tensor]:
        """The rows' heads [R * K] laid out as [P * K * widest group]: where each place takes its head from, and where
        each head went."""
        if kinds not in self._places:
            order = self.prompt_of.argsort(stable=True)
            counts = self.prompt_of.bincount(minlength=len(self.mask))
            number = torch.arange(len(order), device=order.device)  # within its group:
            number -= (counts.cumsum(0) - counts).repeat_interleave(counts)
            widest = int(counts.max())
            kind = torch.arange(kinds, device=order.device)
            went = torch.empty((len(order), kinds), dtype=torch.long, device=order.device)
            went[order] = (self.prompt_of[order, None] * kinds + kind) * widest + number[:, None]
            taken = torch.zeros(len(counts) * kinds * widest, dtype=torch.long, device=order.device)
            taken[went.flatten()] = torch.arange(went.numel(), device=order.device)
            self._places[kinds] = taken, went.flatten()
        return self._places[kinds]

    def select(self, stay: Tensor) -> None:
        """Go on with these rows; a prompt that nobody continues is let go."""
        left, prompt_of = self.prompt_of[stay].unique(return_inverse=True)
        if len(left) < len(self.mask):
            self.mask = self.mask[left]
            self.prompts = [(keys[left], values[left]) for keys, values in self.prompts]
        self._arrange(prompt_of)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of one token per row, `query`[R, H, 1, d], over its prompt and its own `key`, `value`: the room of
        the layer, [R, K, room, d], of which what is written counts.

        Returns [R, 1, H, d]. The heads that share keys are one matrix, and so are the rows that share a prompt.
        """
        prompt_keys, prompt_values = self.prompts[layer]
        prompts, kinds, length, dim = prompt_keys.shape
        rows, per_kind, width = len(query), query.shape[1] // kinds, value.shape[3]
        taken, went = self._layout(kinds)

        def grouped(x: Tensor) -> Tensor:
            """[R * K, H/K, n] as [P * K, widest group * H/K, n]."""
            return x.flatten(1).index_select(0, taken).view(prompts * kinds, -1, x.shape[2])

        def by_row(x: Tensor) -> Tensor:
            """The way back."""
            return x.reshape(len(taken), -1).index_select(0, went).view(rows * kinds, per_kind, -1)

        query = query.to(key.dtype) * (dim**-0.5 if scaling is None else scaling)
        query = query.reshape(rows * kinds, per_kind, dim)
        to_prompt = torch.bmm(grouped(query), prompt_keys.flatten(0, 1).transpose(1, 2))
        if self.hidden is not None:
            to_prompt.view(prompts, -1, to_prompt.shape[1], length).masked_fill_(self.hidden, float("-inf"))
        to_own = torch.bmm(query, key.flatten(0, 1).transpose(1, 2))
        to_own[..., self.own[layer].get_seq_length() :] = float("-inf")
        weights = torch.cat([to_prompt, grouped(to_own)], -1).softmax(-1).to(value.dtype)
        from_prompt = by_row(torch.bmm(weights[..., :length], prompt_values.flatten(0, 1)))
        from_own = torch.bmm(by_row(weights[..., length:]), value.flatten(0, 1))
        return (from_prompt + from_own).view(rows, 1, -1, width)

    def whole(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, K, L, d] of one layer as a cache without groups would hold them."""
        prompt_of = self.prompt_of[rows]
        own = self.own[layer]
        parts = zip(self.prompts[layer], (own.keys[rows], own.values[rows]), strict=True)
        keys, values = (torch.cat([prompt[prompt_of], own], 2) for prompt, own in parts)
        return keys, values


@torch.no_grad()
def may_attend(model: PreTrainedModel, prompt: Sequence[int]) -> bool:
    """Whether our attention may serve rows of this model: reasons known beforehand, then all ways compared, once.

    The model is as it will be used: in evaluation mode, with the weights it samples with.
    """
    known = _checked.setdefault(model, {})
    attention = attention_of(model)  # which may be changed between two calls
    if attention not in known:
        reason = tree_unsupported_reason(model)
        layers = {type(layer) for layer in roomy_cache(model).layers}
        if reason is None and layers != {RoomyLayer}:
            reason = "not all of its layers attend to everything"
        if reason is None:
            install(model)
            reason = _disagreement(model, list(prompt)[-CHECK_TOKENS:])
            if reason is not None:
                warnings.warn(
                    f"{type(model).__name__}: every completion gets its own copy of the prompt in the cache, and the "
                    f"model's own attention reads it (correct, but slower): {reason}",
                    stacklevel=2,
                )
        known[attention] = reason is None
    if known[attention]:
        install(model)
    return known[attention]


def _disagreement(model: PreTrainedModel, prompt: list[int]) -> str | None:
    """Compare what may follow a prompt, its first part, and one token more of either with the model's own numbers."""
    device = device_of(model)
    prompts = [prompt, prompt[: max(1, len(prompt) * 2 // 3)]]
    ends = torch.tensor([[prompt[0]], [prompt[-1]]], device=device)
    whole = (torch.tensor([[*text, int(end)]], device=device) for text, end in zip(prompts, ends, strict=True))
    plain = torch.cat([model(input_ids=ids, use_cache=False).logits[0, -2:] for ids in whole])
    mask = torch.tensor([[0] * (len(prompt) - len(text)) + [1] * len(text) for text in prompts], device=device)
    for kind in (PromptCopies, PromptGroups):
        cache = roomy_cache(model)
        try:
            before = read_prompts(model, prompts, cache)
            rows = kind(cache, mask, torch.tensor([0, 1], device=device))
            after = model(
                input_ids=ends,
                position_ids=mask.sum(1, keepdim=True),
                past_key_values=cache,
                use_cache=True,
                **step_inputs(rows),
            ).logits[:, -1]
        except PASS_ERRORS as error:
            return f"the pass with our attention failed: {error}"
        different = difference_of_draws(model, plain, torch.stack([before, after], 1).flatten(0, 1))
        if different is not None:
            return different
    return None


def difference_of_draws(model: PreTrainedModel, plain: Tensor, ours: Tensor) -> str | None:
    """What is wrong with our logits [R, V], if tokens drawn from them differ from the plain ones by more than
    rounding."""
    expected, found = (x.float().log_softmax(-1) for x in (plain, ours))
    # How far off a token drawn here would be: what is next to impossible carries most of the rounding.
    likely = expected.exp()
    off = torch.where(likely > 0, likely * (expected - found).abs(), 0).sum(-1)
    return difference(model, torch.zeros_like(off), off)


def step_inputs(rows: PromptGroups | PromptCopies) -> dict[str, Any]:
    """What a decoding step of such rows is called with besides tokens and positions."""
    # A 4D mask is passed through as it is instead of a new one being built at each step; nothing reads it.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rows.own[0].keys.device)
    return {"attention_mask": mask, "decoding_rows": rows}

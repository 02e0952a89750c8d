"""Attention over a row of shared prefixes (`rlme.prefix_tree`), inside an unchanged Hugging Face model.

The model is called as always, with one row of tokens [1, S], their position ids, and the row's `TreeLayout`
as an extra keyword argument. Transformers hands unknown keywords down to the attention function, and ours
(registered through `AttentionInterface`, installed once per model) lets each token attend to its ancestors.
Without a layout it is the attention the model had before, so generation and ordinary forwards do not change.
The layout travels as an argument, not as state, so that gradient checkpointing recomputes with the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlme.errors import InputError
from rlme.key_values import HeldPrefix, KeyValues
from rlme.prefix_tree import Ints, Tile, batch_tiles, build_row, plan_tiles, tile_mask, without_known

PREFIX = "rlme_tree_"  # our attention over "sdpa" is registered as "rlme_tree_sdpa"
TOLERANCE = 1e-3  # float32: largest difference of a token's log-probability, in nats
LOW_PRECISION_TOLERANCE = 0.1  # bfloat16, float16, autocast: mean difference (SmolLM2-135M: at most 0.08)
KEY_MULTIPLE = 16  # keys of a batch are filled up to it: fused attention on CPUs is 5 to 13 % faster, products 1 %
KEPT_MASK = 1 << 23  # entries of a mask that is held for all layers
# On a GPU, where starting one more batch takes longer than this many scores of padding (H200, Qwen3-0.6B's shape).
SPARE_SCORES = 1 << 18
# cuDNN's attention prepares itself for every new shape, for a millisecond and more, and tiles seldom have that of
# others: with it the judging of 32 answers took three times as long (H200). Flash attention takes no mask.
CUDA_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BLOCK_SCORES = 1 << 20  # scores of plain products that exist at a time: about what caches of the second level hold
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
PASS_ERRORS = (NotImplementedError, RuntimeError, TypeError, ValueError)  # what a model raises that refuses our call


class TileBatch:
    """N tiles padded to Lq queries and Lk keys: indices into the row, and masks per sliding window."""

    def __init__(self, tiles: Sequence[Tile], positions: Ints, held: int, device: torch.device) -> None:
        widest, longest = max(t.stop - t.start for t in tiles), max(len(t.keys) for t in tiles)
        longest = -(-longest // KEY_MULTIPLE) * KEY_MULTIPLE
        queries = np.zeros((len(tiles), widest), np.int64)
        keys = np.zeros((len(tiles), longest), np.int64)
        of_key = np.full((len(tiles), longest), np.iinfo(np.int64).max)  # padding comes after every query
        for i, tile in enumerate(tiles):
            queries[i, : tile.stop - tile.start] = np.arange(tile.start, tile.stop)
            keys[i, : len(tile.keys)] = tile.keys
            of_key[i, : len(tile.keys)] = positions[tile.keys]
        self.shape = queries.shape[0], widest, longest
        self.queries = torch.from_numpy(queries - held).clamp_(min=0).to(device).flatten()
        self.keys = torch.from_numpy(keys).to(device).flatten()
        self.positions = tuple(torch.from_numpy(x).to(device) for x in (positions[queries], of_key))
        self.branches: Tensor | None = None
        if any(len(tile.runs) > 1 for tile in tiles):
            branches = np.ones(self.shape, bool)  # a padded query attends as the row's first token does
            for i, tile in enumerate(tiles):
                branches[i, : tile.stop - tile.start, : len(tile.keys)] = tile_mask(tile)
            self.branches = torch.from_numpy(branches).to(device)
        self.masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[N, 1, Lq, Lk] additive mask (0 or -inf), made once and used by all layers with this window; a large one, of
        long texts, is made again for each."""
        key = window, dtype
        if key in self.masks:
            return self.masks[key]
        of_query, of_key = self.positions[0][:, :, None], self.positions[1][:, None, :]
        hidden = of_key > of_query  # all that there is to say where nothing branches
        if self.branches is not None:
            hidden |= ~self.branches
        if window is not None:
            hidden |= of_query - of_key >= window
        mask = torch.zeros(self.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]
        # A backward pass holds it anyway, and then one for all layers is less than one for each.
        if mask.numel() <= KEPT_MASK or torch.is_grad_enabled():
            self.masks[key] = mask
        return mask


class Keeper(Protocol):
    """Takes keys and values of a pass, [1, K, S, d] of layer n, those of what is known before it included."""

    def keep(self, number: int, keys: Tensor, values: Tensor) -> None: ...


class TreeLayout:
    """What attention needs to know of a row: batches of tiles, and where in them each token's output lies."""

    def __init__(
        self, tiles: Sequence[Tile], positions: Ints, device: torch.device, known: KeyValues | HeldPrefix | None = None
    ) -> None:
        self.known = known
        self.keepers: list[Keeper] = []  # who wants the keys and values of this pass
        self.gives_back: HeldPrefix | None = None  # what earlier passes went on from; the row begins with it
        held = 0 if known is None else known.tokens
        batches = batch_tiles(tiles, 0 if device.type == "cpu" else SPARE_SCORES)
        self.batches = [TileBatch(batch, positions, held, device) for batch in batches]
        origin = np.zeros(len(positions) - held, np.int64)
        offset = 0
        for batch, members in zip(self.batches, batches, strict=True):
            for tile in members:
                origin[tile.start - held : tile.stop - held] = offset + np.arange(tile.stop - tile.start)
                offset += batch.shape[1]
        self.origin = torch.from_numpy(origin).to(device)


class TreeInputs:
    """Token sequences ready for one forward pass: `model(**inputs.kwargs)` computes one row of S tokens.

    `known`: keys and values that need no computing; `places[i]` says where those of the first tokens of sequence i
    lie in it. `paths[i][t]` is negative for them: the pass has no hidden state of theirs; `places[i][t]` counts them.
    `keep`: the first tokens of the last sequence, to be held for other passes. `gives_back`: the first tokens of all
    sequences, which other passes were spared.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        known: KeyValues | HeldPrefix | None = None,
        places: Sequence[Ints] = (),
        *,
        keep: HeldPrefix | None = None,
        gives_back: HeldPrefix | None = None,
    ) -> None:
        row = build_row(sequences)
        positions = row.positions
        if known is not None:
            row = without_known(row, places, known.tokens)
            positions = np.concatenate([known.positions, row.positions])
        self.places = row.paths
        self.paths = [path - (known.tokens if known else 0) for path in row.paths]
        self.tokens = len(row.tokens)
        self.layout = TreeLayout(plan_tiles(row.runs), positions, device, known)
        self.layout.gives_back = gives_back
        if keep is not None:
            keep.where = torch.from_numpy(row.paths[-1][: keep.tokens]).to(device)
            self.layout.keepers.append(keep)
        self.kwargs: dict[str, Any] = {
            "input_ids": torch.from_numpy(row.tokens).to(device)[None],
            "position_ids": torch.from_numpy(row.positions).to(device)[None],
            # Transformers passes a 4D mask through as it is instead of building its own; the layout replaces
            # it.
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
            "tree_layout": self.layout,
            "use_cache": False,
        }


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of every token of a row over its ancestors and itself.

    `query`[1, H, S, d], `key` and `value`[1, K, S, d] with K key-value heads -> [1, S, H, d]. What the layout holds
    besides comes first among the keys.
    """
    kind = query.device.type
    if layout.gives_back is not None:
        layout.gives_back.give_back(cast(int, module.layer_idx), key, value)
    if layout.known is not None:
        key, value = (
            torch.cat([held.to(new.dtype).transpose(0, 1)[None], new], dim=2)
            for held, new in zip(layout.known.layer(cast(int, module.layer_idx)), (key, value), strict=True)
        )
    for keeper in layout.keepers:
        keeper.keep(cast(int, module.layer_idx), key, value)
    # Rotary embeddings leave queries and keys in float32; under autocast attention computes in its dtype anyway.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [S, heads, d]
    # PyTorch's fused attention on CPUs takes bfloat16 at a quarter of the matrix rate, and its gradient at a tenth.
    on_cpu = kind == "cpu"
    products = on_cpu and dtype == torch.bfloat16 and dropout == 0
    if not on_cpu and query.shape[1] != key.shape[1]:  # with a mask, fused GPU kernels want as many key heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    outputs = []
    with sdpa_kernel(CUDA_KERNELS) if kind == "cuda" else nullcontext():
        for batch in layout.batches:
            count, widest, longest = batch.shape
            q = query.index_select(0, batch.queries).view(count, widest, *query.shape[1:]).transpose(1, 2)
            k = key.index_select(0, batch.keys).view(count, longest, *key.shape[1:]).transpose(1, 2)
            v = value.index_select(0, batch.keys).view(count, longest, *value.shape[1:]).transpose(1, 2)
            if products:
                out = _attend_by_products(q, k, v, batch.mask(sliding_window, q.dtype), scaling)
            else:
                out = nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=batch.mask(sliding_window, q.dtype),
                    dropout_p=dropout,
                    scale=scaling,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.origin)[None]


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Softmax attention of `q`[N, H, Lq, d] over `k`, `v`[N, K, Lk, d] by plain products. The heads that share keys are
    one matrix; a few matrices are taken at a time, so that their scores stay in the cache."""
    heads, widest, dim = q.shape[1:]
    kinds, longest = k.shape[1:3]
    scale = dim**-0.5 if scaling is None else scaling
    matrices = max(1, BLOCK_SCORES // (heads // kinds * widest * longest))
    outputs = []
    for q_tiles, k_tiles, v_tiles, allowed in zip(
        *(x.split(max(1, matrices // kinds)) for x in (q, k, v, mask)), strict=True
    ):
        count = len(allowed)  # 1 where not all heads of a tile fit
        flat = (x.reshape(count * kinds, -1, x.shape[3]) for x in (q_tiles, k_tiles, v_tiles))
        for queries, keys, values in zip(*(x.split(count * min(kinds, matrices)) for x in flat), strict=True):
            scores = allowed.repeat(1, len(keys) // count * (heads // kinds), 1, 1).view(len(keys), -1, longest)
            weights = scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scale).softmax(-1)
            outputs.append(torch.bmm(weights, values))
    return torch.cat(outputs).view(len(q), heads, widest, -1)


class DecodingRows(Protocol):
    """Rows that continue prompts read once (`rlme.prompt_groups`): attention of one new token of each."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor: ...


def _dispatch(base: str) -> Any:
    attend_as_before = ALL_ATTENTION_FUNCTIONS[base]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        tree_layout: TreeLayout | None = None,
        decoding_rows: DecodingRows | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if tree_layout is None and decoding_rows is None:
            output: tuple[Tensor, Tensor | None] = attend_as_before(module, query, key, value, attention_mask, **kwargs)
            return output
        refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if refused or kwargs.get("is_causal") is False:
            raise NotImplementedError(f"attention with {', '.join(refused) or 'is_causal=False'}")
        if decoding_rows is not None:
            layer = cast(int, module.layer_idx)
            return decoding_rows.attend(layer, query, key, value, kwargs.get("scaling")), None
        # The layout takes the place of the mask, so nothing that only the mask says may count.
        if attention_mask is not None and attention_mask.numel() != 1:
            raise NotImplementedError("a mask that the attention layers make themselves")
        names = ("dropout", "scaling", "sliding_window")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if "sliding_window" not in options and _has_window(module):
            raise NotImplementedError("a sliding window that only the mask knows of")
        return tree_attention(module, query, key, value, cast(TreeLayout, tree_layout), **options), None

    return attention


def _has_window(module: nn.Module) -> bool:
    """Whether the configuration gives this layer's attention a sliding window."""
    config = getattr(module, "config", None)
    if kinds := getattr(config, "layer_types", None):
        return bool(kinds[cast(int, module.layer_idx)] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside wrappers (DDP, accelerate, PEFT)."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if isinstance(model, PeftModel) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"{type(model).__name__} wraps no transformers model")
        model = inner
    return model


def check_adapter(model: nn.Module) -> None:
    """Raise `InputError` for an adapter whose tokens of its own stand before every text (prefix and prompt tuning)."""
    for active in getattr(model, "peft_config", {}).values():
        if active.is_prompt_learning:
            raise InputError(
                f"the model's adapter is of PEFT's type {active.peft_type.value}, which puts tokens of its own before "
                "every text; expected one that does not, such as LORA"
            )


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    return device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards the model's mode is what it was."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def tolerance(inner: PreTrainedModel) -> float:
    """How far apart a token's log-probabilities by two ways of computing may be and still be rounding."""
    rounding = inner.dtype != torch.float32 or torch.is_autocast_enabled(device_of(inner).type)
    return LOW_PRECISION_TOLERANCE if rounding else TOLERANCE


def difference(inner: PreTrainedModel, plain: Tensor, ours: Tensor) -> str | None:
    """What is wrong with our log-probabilities, if they differ from the plain ones by more than rounding."""
    allowed = tolerance(inner)
    differences = (plain - ours).detach().abs()
    difference = float(differences.max() if allowed == TOLERANCE else differences.mean())
    if difference <= allowed or not bool(plain.isfinite().all()):
        return None
    return f"log-probabilities differ by {difference:.3g} (at most {allowed} is rounding)"


def attention_of(inner: PreTrainedModel) -> str:
    """The name of the attention that a model has without ours."""
    return (inner.config._attn_implementation or "eager").removeprefix(PREFIX)


def install(model: nn.Module) -> None:
    """Let a model accept `tree_layout`. Its ordinary behaviour stays as it is; a second call does nothing."""
    inner = causal_lm(model)
    base = inner.config._attn_implementation
    if base.startswith(PREFIX):
        return
    name = PREFIX + base
    AttentionInterface.register(name, _dispatch(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    inner.set_attn_implementation(name)


def tree_unsupported_reason(model: nn.Module) -> str | None:
    """Why a model cannot run on shared prefixes, or None where nothing known speaks against it."""
    try:
        inner = causal_lm(model)
    except TypeError as error:
        return str(error)
    config = inner.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS
    attention = attention_of(inner)
    if layers:
        return f"it has layers of type {', '.join(sorted(layers))}"
    if inner.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not inner._supports_attention_backend:
        return f"{type(inner).__name__} does not take a custom attention function"
    if getattr(inner, "_is_stateful", False):
        return "it has a recurrent state"
    for key in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, key, None):
            return f"its configuration sets {key}"
    if attention not in ALL_ATTENTION_FUNCTIONS:
        other = " (load it with attn_implementation='sdpa')" if inner._supports_sdpa else ", and it has no other"
        return f"its attention implementation is {attention!r}{other}"
    if "flash" in attention or "/" in attention:  # transformers takes every such name for one of its kernels'
        return f"its attention implementation is {attention!r} (load it with attn_implementation='sdpa')"
    return None

"""One forward pass over a pack of sequences, and what turns its hidden states into log-probabilities.

The hidden states are those that the LM head is called on, whatever a model does before it; the head itself multiplies
nothing, its part is `rlme.lm_head`'s. Where that does not give the model's own logits, these are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlme.errors import InputError
from rlme.key_values import HELD_FROM, HeldPrefix, KeyValues
from rlme.lm_head import LMHead, WholeLogits
from rlme.prefix_tree import Ints, plan_packs, shared_length
from rlme.tree_attention import PASS_ERRORS, TreeInputs, causal_lm, device_of, difference, evaluating

_checked: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass: `hidden[P, D]` before the LM head (`WholeLogits`: the logits), `paths[i][t]`: where in it
    token t of sequence i lies.
    """

    hidden: Tensor
    paths: list[Ints]
    tokens: int  # positions computed, padding included


def forward_pass(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    head: LMHead | WholeLogits,
    *,
    share: bool,
    known: KeyValues | HeldPrefix | None = None,
    places: Sequence[Ints] = (),
    keep: HeldPrefix | None = None,
    gives_back: HeldPrefix | None = None,
) -> Forward:
    """Compute the sequences in one pass: as one row of shared prefixes, or padded on the right."""
    device = device_of(causal_lm(model))
    if share:
        tree = TreeInputs(sequences, device, known, places, keep=keep, gives_back=gives_back)
        return Forward(_hidden_states(model, **tree.kwargs), tree.paths, tree.tokens)
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)], mask[i, : len(sequence)] = sequence, 1
    inputs = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
        "use_cache": False,
    }
    whole = isinstance(head, WholeLogits)
    hidden = model(**inputs).logits.flatten(0, 1) if whole else _hidden_states(model, **inputs)
    paths = [i * longest + np.arange(len(sequence)) for i, sequence in enumerate(sequences)]
    return Forward(hidden, paths, ids.size)


def _hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[B * T, D] hidden states that the LM head is called on.

    The wrapped model is called, so that DDP, PEFT and autocast see an ordinary forward; a hook takes what comes to
    the head and leaves it nothing to multiply. Raises `RuntimeError` where the model does not call its head.
    """
    found: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return args[0].narrow(-2, 0, 0), *args[1:]

    head: nn.Module | None = causal_lm(model).get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise RuntimeError("the model has no LM head")
    hook = head.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        hook.remove()
    if len(found) != 1:
        raise RuntimeError(f"the model called its LM head {len(found)} times")
    return found[0].reshape(-1, found[0].shape[-1])


def forward_passes(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    head: LMHead | WholeLogits,
    token_budget: int | None,
    *,
    share: bool,
    read_from: Sequence[int],
    known: KeyValues | None = None,
    places: Sequence[Ints] = (),
    hold: bool = False,
) -> Iterator[tuple[list[int], Forward]]:
    """Compute the sequences in passes of at most `token_budget` tokens, without gradient where they are several: the
    indices of those of a pass, and the pass. `hold`: what one pass shares with the next is not computed again; of
    sequence i, hidden states are wanted from token `read_from[i]` on."""
    lengths = [len(p) for p in places] if known is not None else None
    packs = plan_passes(sequences, token_budget, share=share, known=lengths, kind=length_kind(model), hold=hold)
    for pack, held, where, keep in in_turn(sequences, packs, read_from, hold=hold):
        where = [places[n] for n in pack] if known else where
        some = [sequences[n] for n in pack]
        yield pack, forward_pass(model, some, head, share=share, known=known or held, places=where, keep=keep)


def in_turn(
    sequences: Sequence[Sequence[int]], packs: Sequence[list[int]], read_from: Sequence[int], *, hold: bool
) -> Iterator[tuple[list[int], HeldPrefix | None, list[Ints], HeldPrefix | None]]:
    """Each pack with what the pass before it holds, where in that the first tokens of its sequences are, and what it is
    to keep for the next (nothing without `hold`)."""
    held: HeldPrefix | None = None
    for pack, following in zip_longest(packs, packs[1:]):
        keep = None
        if hold and following is not None:
            last = sequences[pack[-1]]
            shared = shared_length(last, sequences[following[0]])
            keep = HeldPrefix(last[:shared]) if shared >= HELD_FROM else None
        yield pack, held, [held.places(sequences[n], read_from[n]) for n in pack] if held else [], keep
        held = keep


LengthKind = Callable[[int], int]


def length_kind(model: nn.Module) -> LengthKind | None:
    """Which lengths may share a pass, for models whose rotary embedding follows the longest text in it (`longrope`:
    Phi-3-128k, Phi-4-mini; `dynamic`): those of one kind. None for all other models."""
    config = causal_lm(model).config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    by_layer = [one for one in found.values() if isinstance(one, dict) and "rope_type" in one]
    ropes = {rope.get("rope_type"): rope for rope in by_layer or [found]}
    if "dynamic" in ropes:
        limit = config.max_position_embeddings
        return lambda length: length if length > limit else 0
    if "longrope" in ropes:
        limit = ropes["longrope"]["original_max_position_embeddings"]
        return lambda length: int(length > limit)
    return None


def plan_passes(
    sequences: Sequence[Sequence[int]],
    token_budget: int | None,
    *,
    share: bool,
    known: Sequence[int] | None = None,
    kind: LengthKind | None = None,
    hold: bool = False,
) -> list[list[int]]:
    """Indices of the sequences of each forward pass, one of each `kind` without a budget; padded batches hold rows of
    similar length. `hold`: a pass need not compute again what it shares with the one before."""
    if kind is not None:
        members: dict[int, list[int]] = {}
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
            members.setdefault(kind(len(sequences[i])), []).append(i)
        return [
            [some[j] for j in pack]
            for some in members.values()
            for pack in plan_passes(
                [sequences[i] for i in some], token_budget, share=share, known=known and [known[i] for i in some]
            )
        ]
    if token_budget is None:
        return [list(range(len(sequences)))]
    if share:
        return plan_packs(sequences, token_budget, known, HELD_FROM if hold else None)
    packs: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if packs and (len(packs[-1]) + 1) * len(sequences[i]) <= token_budget:
            packs[-1].append(i)
        else:
            packs.append([i])
    return packs


def head_of(model: nn.Module, sequence: Sequence[int]) -> LMHead | WholeLogits:
    """What reads the hidden states of padded passes: compared with the model's own logits, once, on a sequence.

    Raises `InputError` for a model whose logits depend on what follows, or on padding.
    """
    inner = causal_lm(model)
    if inner not in _checked:
        with torch.no_grad(), evaluating(model):
            ids = torch.tensor([list(sequence)], device=device_of(inner))
            plain = model(input_ids=ids, use_cache=False).logits[0]
            reason = _disagreement(model, sequence, plain, LMHead(inner))
            if reason is not None:
                wrong = _disagreement(model, sequence, plain, WholeLogits())
                if wrong is not None:
                    raise InputError(
                        f"{type(inner).__name__}: the logits of a text depend on what follows it, or on padding "
                        f"({wrong}); expected a causal language model (of BERT's kin: is_decoder=true in config.json)"
                    )
                warnings.warn(
                    f"{type(inner).__name__}: logits of all positions are held at a time (correct, but with more "
                    f"memory): our reading of its LM head does not give them: {reason}",
                    stacklevel=3,
                )
        _checked[inner] = reason is None
    return LMHead(inner) if _checked[inner] else WholeLogits()


def _disagreement(model: nn.Module, sequence: Sequence[int], logits: Tensor, head: LMHead | WholeLogits) -> str | None:
    """Compare `logits`[T, V] of a sequence with those read from a padded batch of it and of its first half."""
    try:
        rows = [sequence, sequence[: max(1, len(sequence) // 2)]]
        passed = forward_pass(model, rows, head, share=False)
        where = torch.from_numpy(np.concatenate(passed.paths)).to(logits.device)
        plain = torch.cat([logits[: len(row)] for row in rows]).float().log_softmax(-1)
        likely = plain.argmax(-1)
        ours, _ = head.logps(passed.hidden.index_select(0, where), likely, 1.0, False)
    except PASS_ERRORS as error:
        return str(error)
    return difference(causal_lm(model), plain.gather(-1, likely[:, None])[:, 0], ours)

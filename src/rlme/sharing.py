"""What passes of a model may share: reasons known beforehand, then both ways compared, once for each model.

Where they differ, that way is off for the model from then on, with a warning that names the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from rlme.forward import forward_pass, length_kind
from rlme.key_values import HELD_FROM, HeldPrefix, KeyValues
from rlme.lm_head import LMHead
from rlme.prefix_tree import Ints, plan_packs, shared_length
from rlme.tree_attention import (
    PASS_ERRORS,
    attention_of,
    causal_lm,
    check_adapter,
    device_of,
    difference,
    evaluating,
    install,
    tolerance,
    tree_unsupported_reason,
)

CHECK_TOKENS = 512  # a comparison takes a sample of about this many tokens
LAYER_WEIGHTS, LAYER_SIZE = 14, 1 << 26  # and the gradients of as many: seven projections with two factors each

_sharing: WeakKeyDictionary[PreTrainedModel, dict[tuple[bool, str], str | None]] = WeakKeyDictionary()
_reusing: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_holding: WeakKeyDictionary[PreTrainedModel, dict[tuple[bool, str], bool]] = WeakKeyDictionary()


def may_share(model: nn.Module, sequences: Sequence[Sequence[int]], *, gradient: bool) -> bool:
    """Whether sharing is exact for this model: reasons known beforehand, then both paths compared, once."""
    inner = causal_lm(model)
    check_adapter(model)
    known = _sharing.setdefault(inner, {})
    attention = attention_of(inner)  # which may be changed between two calls
    if (gradient, attention) not in known:
        reason = tree_unsupported_reason(model)
        if reason is None:
            install(model)
            if not sequences:
                return True  # nothing can be compared: ask again next time
            reason = _disagreement(model, _sample(sequences), gradient=gradient)
        known[gradient, attention] = reason
        if reason is not None:
            warnings.warn(
                f"{type(inner).__name__}: prefixes are not shared (correct, but slower): {reason}",
                stacklevel=3,
            )
    if known[gradient, attention] is None:
        install(model)
    return known[gradient, attention] is None


def may_reuse(model: nn.Module, sequence: Sequence[int], known: KeyValues, places: Ints) -> bool:
    """Whether held keys and values give what a whole pass gives: compared once for each model, on one sequence."""
    inner = causal_lm(model)
    if inner not in _reusing:
        off = "keys and values from sampling are not reused for judging"
        _reusing[inner] = _agrees(inner, off, partial(_known_differ, model, sequence, known, places))
    return _reusing[inner]


@torch.no_grad()
def may_hold(model: nn.Module, sequences: Sequence[Sequence[int]], token_budget: int | None) -> bool:
    """Whether passes without gradient may go on from what the one before them has read. Only asked of a model where
    they would."""
    if token_budget is None or length_kind(model) is not None:  # it may embed positions otherwise in another pass
        return False
    packs = plan_packs(sequences, token_budget)
    cuts = ((sequences[before[-1]], sequences[after[0]]) for before, after in pairwise(packs))
    cut = next((pair for pair in cuts if shared_length(*pair) >= HELD_FROM), None)
    return cut is not None and _holds(model, cut, gradient=False)


def may_train_held(model: nn.Module, sequences: Sequence[Sequence[int]]) -> bool:
    """Whether sequences that begin alike may be trained in several passes one of which reads that for all."""
    if _is_random(model) or length_kind(model) is not None or not may_share(model, sequences, gradient=True):
        return False
    return _holds(causal_lm(model), sequences, gradient=True)  # distributed wrappers do not allow torch.autograd.grad


def _is_random(model: nn.Module) -> bool:
    """Whether dropout makes two passes over the same tokens differ."""
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or isinstance(module, _DropoutNd))
        for module in model.modules()
        for name, value in vars(module).items()
    )


def _holds(model: nn.Module, sequences: Sequence[Sequence[int]], *, gradient: bool) -> bool:
    """Compare two sequences in one pass and in two, the second of which goes on from what the first has read."""
    inner = causal_lm(model)
    known = _holding.setdefault(inner, {})
    key = gradient, attention_of(inner)
    if key not in known:
        differ = _held_gradient_differs if gradient else _held_values_differ
        off = "what several passes share is read in each of them"
        known[key] = _agrees(inner, off, partial(differ, model, _sample(sequences)))
    return known[key]


def _agrees(inner: PreTrainedModel, off: str, differ: Callable[[], str | None]) -> bool:
    """Whether a pass with held keys and values is one without; a warning says what is `off` where it is not."""
    try:
        reason = differ()
    except PASS_ERRORS as error:  # a cache of something else than keys and values, as in latent attention
        reason = f"the pass with them failed: {error}"
    if reason is not None:
        warnings.warn(f"{type(inner).__name__}: {off} (correct, but slower): {reason}", stacklevel=5)
    return reason is None


def _known_differ(model: nn.Module, sequence: Sequence[int], known: KeyValues | HeldPrefix, places: Ints) -> str | None:
    inner = causal_lm(model)
    head = LMHead(inner)
    logps = []
    for held, where in ((None, places[:0]), (known, places)):
        forward = forward_pass(model, [sequence], head, share=True, known=held, places=[where])
        hidden = forward.hidden[forward.paths[0][len(places) :]]
        # Any tokens serve for the comparison: those of the sequence's end.
        logps.append(head.read(hidden, torch.arange(len(hidden)), torch.tensor(sequence[len(places) :])))
    return difference(inner, *logps)


def _held_values_differ(model: nn.Module, sample: Sequence[Sequence[int]]) -> str | None:
    first, second = sample
    held = HeldPrefix(first[: shared_length(first, second)])
    with evaluating(model):
        forward_pass(model, [first], LMHead(causal_lm(model)), share=True, keep=held)
        return _known_differ(model, second, held, held.positions)


def _held_gradient_differs(model: nn.Module, sample: Sequence[Sequence[int]]) -> str | None:
    inner = causal_lm(model)
    weights = _first_layer(inner)
    head = LMHead(inner)
    shared = shared_length(*sample)
    held = HeldPrefix(sample[0][: shared - 1], gradient=True)

    def logps(some: Sequence[Sequence[int]], **options: Any) -> Tensor:
        """Of the tokens after the prompt, whose last token is read in every pass."""
        passed = forward_pass(model, some, head, share=True, **options)
        where = np.concatenate([path[shared - 1 : -1] for path in passed.paths])
        targets = torch.tensor([token for sequence in some for token in sequence[shared:]])
        found, _ = head.logps(passed.hidden[torch.from_numpy(where)], targets, 1.0, False)
        return found

    with evaluating(model):
        with torch.no_grad():
            forward_pass(model, [held.text], head, share=True, keep=held)
        whole = logps(sample)
        first = logps(sample[:1], known=held, places=[held.positions])
        expected, found = _gradient(whole, weights), _gradient(first, weights, held)
        last = logps(sample[1:], gives_back=held)
        found = found + _gradient(last, weights)
    return difference(inner, whole, torch.cat([first, last])) or _gradient_differs(inner, expected, found)


def _gradient(logps: Tensor, weights: Sequence[nn.Parameter], held: HeldPrefix | None = None) -> Tensor:
    """Of their sum, with respect to the weights; what it wants changed in what is held stays there."""
    leaves = held.leaves() if held else []
    found = torch.autograd.grad(logps.sum(), [*weights, *leaves], materialize_grads=True)
    for leaf, owed in zip(leaves, found[len(weights) :], strict=True):
        leaf.grad = owed
    return torch.cat([part.float().flatten() for part in found[: len(weights)]])


def _gradient_differs(inner: PreTrainedModel, expected: Tensor, found: Tensor) -> str | None:
    relative = float((expected - found).norm() / expected.norm().clamp_min(1e-12))
    return None if relative <= max(0.01, tolerance(inner)) else f"a gradient differs by {relative:.1%}"


def _sample(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Two sequences that share a prefix, cut to `CHECK_TOKENS`: where none do, the longest one and another ending."""
    ordered = sorted({tuple(sequence) for sequence in sequences})
    best: list[Sequence[int]] = []
    most = 0
    for a, b in pairwise(ordered):
        shared = shared_length(a, b)
        length = min(len(a), len(b), CHECK_TOKENS)
        if most < shared < length:
            best, most = [a[:length], b[:length]], shared
    if not best:
        longest = max(ordered, key=len)[:CHECK_TOKENS]
        longest = longest if len(longest) > 1 else longest * 2
        half = len(longest) // 2
        best = [longest, longest[:half] + longest[half:][::-1]]
    return best


def _disagreement(model: nn.Module, sample: list[Sequence[int]], *, gradient: bool) -> str | None:
    """Compare log-probabilities and a gradient of both paths; the plain one takes the model's own logits."""
    inner = causal_lm(model)
    device = device_of(inner)
    tokens = torch.tensor([list(sequence) for sequence in sample], device=device)
    weights = _first_layer(inner)
    # Distributed wrappers do not allow torch.autograd.grad.
    differentiable = gradient and bool(weights) and model is inner
    try:
        with torch.set_grad_enabled(differentiable), evaluating(model):
            plain = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            plain = plain.gather(-1, tokens[:, 1:, None])[..., 0].flatten()
            head = LMHead(inner)
            forward = forward_pass(model, sample, head, share=True)
            where = torch.from_numpy(np.concatenate([path[:-1] for path in forward.paths])).to(device)
            hidden = forward.hidden.index_select(0, where)
            ours, _ = head.logps(hidden, tokens[:, 1:].flatten(), 1.0, False)
        reason = difference(inner, plain, ours)
        if reason is not None:
            return reason
        if differentiable:
            return _gradient_differs(inner, *(_gradient(logps, weights) for logps in (plain, ours)))
    except PASS_ERRORS as error:
        return f"the shared pass failed: {error}"
    return None


def _first_layer(inner: PreTrainedModel) -> list[nn.Parameter]:
    """The first parameters that are trained, about those of a layer: alone, one of attention may have no gradient (of
    a text of one token, or of one token repeated), and rounding would be all that is compared."""
    weights: list[nn.Parameter] = []
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and "embed" not in name:
            weights.append(parameter)
        if len(weights) == LAYER_WEIGHTS or sum(p.numel() for p in weights) > LAYER_SIZE:
            break
    return weights

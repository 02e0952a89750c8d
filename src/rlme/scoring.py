"""Log-probabilities of tokens after contexts that share prefixes: for judges (no gradient) and for the loss.

Both run on `rlme.prefix_tree` where the model supports it, and on ordinary right-padded batches where it does
not or where `share=False`. The two give the same numbers up to rounding. A model's first use compares them
once; where they differ, sharing is off for that model from then on, with a warning that names the reason.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlme.forward import forward_pass, head_of, length_kind, plan_passes
from rlme.key_values import KeyValues
from rlme.lm_head import LMHead, WholeLogits
from rlme.load_balance import RouterLogits
from rlme.prefix_tree import Ints, shared_length
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

CHECK_TOKENS = 512  # the first use of a model compares both paths on a sample of about this many tokens
LAYER_WEIGHTS, LAYER_SIZE = 14, 1 << 26  # and the gradients of as many: seven projections with two factors each

_checked: WeakKeyDictionary[PreTrainedModel, dict[tuple[bool, str], str | None]] = WeakKeyDictionary()
_reusable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def continuation_logprobs(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    token_budget: int = 8192,
    share: bool = True,
    known: KeyValues | None = None,
) -> tuple[list[list[float]], int]:
    """Log-probability of each continuation after its context, and the number of tokens computed.

    `continuations[i]` are the token sequences asked for after `contexts[i]`. A log-probability is summed over
    the tokens of the continuation, at temperature 1, normalised over the whole vocabulary in float32. Where
    the model yields no finite logits it is NaN. Contexts that share prefixes (identical ones, questions about
    one answer, a question after another one's answer) are computed once; a single-token continuation costs no
    token.

    `known`: keys and values that this model, with these weights and in this dtype, has computed before (when it
    sampled): what the contexts begin with is taken from there where prefixes can be shared.

    Memory is bounded by `token_budget` tokens in one forward pass (a single longer context excepted). Dropout
    is off. Raises `ValueError` for an empty context or continuation.
    """
    if any(not context for context in contexts):
        raise ValueError("a context is empty: there is nothing to continue")
    if any(not continuation for asked in continuations for continuation in asked):
        raise ValueError("a continuation is empty: it has no log-probability")
    asked = [(i, tuple(c)) for i, asked in enumerate(continuations) for c in asked]
    # The last token is only read, never computed on. Identical sequences are one.
    needed = dict.fromkeys((*contexts[i], *continuation[:-1]) for i, continuation in asked)
    sequences = list(needed)
    number = {sequence: n for n, sequence in enumerate(sequences)}
    readers: list[list[int]] = [[] for _ in sequences]
    for a, (i, continuation) in enumerate(asked):
        readers[number[(*contexts[i], *continuation[:-1])]].append(a)

    scores = [math.nan] * len(asked)
    computed = 0
    with evaluating(model):
        share = share and _may_share(model, sequences, gradient=False)
        head = _head(model, sequences, share=share)
        places: list[Ints] = [np.empty(0, np.int64)] * len(sequences)
        kind = length_kind(model)
        crossing = kind is not None and any(kind(len(sequence)) for sequence in sequences)
        if known is not None and (crossing or not (known.tokens and share and sequences)):
            known = None
        if known is not None:
            # The last token of a context has to be computed: its hidden state is what the head reads.
            first_read = [min(len(contexts[asked[a][0]]) for a in readers[n]) - 1 for n in range(len(sequences))]
            places = [p[:end] for p, end in zip(known.find(sequences), first_read, strict=True)]
            longest = max(range(len(sequences)), key=lambda n: len(places[n]))
            if not len(places[longest]) or not _may_reuse(model, sequences[longest], known, places[longest]):
                known, places = None, [p[:0] for p in places]
        # The head reads the hidden states of all passes together: its weights are read (and cast) once.
        states: list[Tensor] = []
        rows: list[int] = []  # for each token of each continuation, the row of `states` before it
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        kept = 0
        for pack in plan_passes(sequences, token_budget, share=share, known=[len(p) for p in places], kind=kind):
            forward = forward_pass(
                model, [sequences[n] for n in pack], head, share=share, known=known, places=[places[n] for n in pack]
            )
            computed += forward.tokens
            reads: list[int] = []
            for n, path in zip(pack, forward.paths, strict=True):
                for a in readers[n]:
                    i, continuation = asked[a]
                    reads.extend(path[len(contexts[i]) - 1 :])
                    targets.extend(continuation)
                    spans.append((a, len(targets)))
            unique, back = np.unique(reads, return_inverse=True)
            states.append(forward.hidden.index_select(0, torch.from_numpy(unique).to(forward.hidden.device)))
            rows.extend((back + kept).tolist())
            kept += len(unique)
        if states:
            logprobs = head.read(torch.cat(states), torch.tensor(rows), torch.tensor(targets)).tolist()
            start = 0
            for a, stop in spans:
                total = math.fsum(logprobs[start:stop])
                scores[a], start = total if math.isfinite(total) else math.nan, stop
    results = iter(scores)
    return [[next(results) for _ in asked] for asked in continuations], computed


def completion_logps(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int] | Tensor],
    completion_ids: Sequence[Sequence[int] | Tensor],
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    token_budget: int | None = None,
    share: bool = True,
    routers: RouterLogits | None = None,
    float32_head: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) of completion tokens, differentiable: one forward pass for one pack
    of rows.

    Row b is `prompt_ids[b]` followed by `completion_ids[b]`, both without padding; a completion may be empty.
    Returns float32 tensors [B, C] where C is the longest completion, zero beyond a row's own length: what
    TRL's `_compute_loss` expects. Logits are divided by `temperature` first. The prompt of a group is
    computed once; no full logits tensor exists. Autocast is the caller's; `float32_head` keeps it from the LM head.

    With a `token_budget` (for passes without gradient) the rows are computed in packs; with gradients, plan
    packs with `plan_rows` and call backward after each, otherwise all their activations are held at once.

    `routers` takes the router logits of every token, the last ones of the completions included.
    """
    prompts = [_as_tuple(ids) for ids in prompt_ids]
    completions = [_as_tuple(ids) for ids in completion_ids]
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: its first completion token has no context")
    # The last token is only read, unless routers are to be heard about it.
    sequences = [p + (c if routers else c[:-1]) for p, c in zip(prompts, completions, strict=True)]
    share = share and _may_share(model, sequences, gradient=torch.is_grad_enabled())
    packs = plan_passes(sequences, token_budget, share=share, kind=length_kind(model))
    head = _head(model, sequences, share=share)
    filled: list[tuple[Tensor, Tensor | None]] = []
    where: list[Tensor] = []
    longest = max(map(len, completions), default=0)
    for pack in packs:
        with routers.listening(model) if routers else nullcontext():
            forward = forward_pass(model, [sequences[b] for b in pack], head, share=share)
        if routers:
            routers.count(forward.paths, len(forward.hidden))
        reads = [
            path[len(prompts[b]) - 1 :][: len(completions[b])] for b, path in zip(pack, forward.paths, strict=True)
        ]
        targets = [token for b in pack for token in completions[b]]
        where.extend(b * longest + torch.arange(len(completions[b])) for b in pack)
        read = torch.from_numpy(np.concatenate(reads)).to(forward.hidden.device)
        wanted = torch.tensor(targets, dtype=torch.long)
        hidden = forward.hidden.index_select(0, read)
        with torch.autocast(hidden.device.type, enabled=False) if float32_head else nullcontext():
            filled.append(head.logps(hidden.float() if float32_head else hidden, wanted, temperature, compute_entropy))
    index = torch.cat(where) if where else torch.empty(0, dtype=torch.long)

    def padded(values: list[Tensor]) -> Tensor:
        flat = torch.cat(values)
        empty = flat.new_zeros(len(sequences) * longest)
        return empty.index_copy(0, index.to(flat.device), flat).view(len(sequences), longest)

    entropies = [entropy for _, entropy in filled if entropy is not None]
    return padded([logps for logps, _ in filled]), padded(entropies) if compute_entropy else None


def plan_rows(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int] | Tensor],
    completion_ids: Sequence[Sequence[int] | Tensor],
    token_budget: int,
    *,
    share: bool = True,
) -> list[list[int]]:
    """Split rows into packs of at most `token_budget` tokens that the model computes with gradients: groups together
    where it shares their prompts, rows of similar length where it does not."""
    pairs = zip(prompt_ids, completion_ids, strict=True)
    sequences = [_as_tuple(p) + _as_tuple(c)[:-1] for p, c in pairs]
    share = share and _may_share(model, sequences, gradient=True)
    return plan_passes(sequences, token_budget, share=share, kind=length_kind(model))


def _as_tuple(ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist() if isinstance(ids, Tensor) else ids)


def _head(model: nn.Module, sequences: Sequence[Sequence[int]], *, share: bool) -> LMHead | WholeLogits:
    """What reads the hidden states. With shared prefixes it has been compared together with them."""
    if share or not sequences:
        return LMHead(causal_lm(model))
    return head_of(model, max(sequences, key=len)[:CHECK_TOKENS])


def _may_share(model: nn.Module, sequences: Sequence[Sequence[int]], *, gradient: bool) -> bool:
    """Whether sharing is exact for this model: reasons known beforehand, then both paths compared, once."""
    inner = causal_lm(model)
    check_adapter(model)
    known = _checked.setdefault(inner, {})
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


def _may_reuse(model: nn.Module, sequence: Sequence[int], known: KeyValues, places: Ints) -> bool:
    """Whether held keys and values give what a whole pass gives: compared once for each model, on one sequence."""
    inner = causal_lm(model)
    if inner not in _reusable:
        head = LMHead(inner)
        logps = []
        try:
            for held, where in ((None, places[:0]), (known, places)):
                forward = forward_pass(model, [sequence], head, share=True, known=held, places=[where])
                hidden = forward.hidden[forward.paths[0][len(places)] :]
                # Any tokens serve for the comparison: those of the sequence's end.
                rows = torch.arange(len(hidden))
                logps.append(head.read(hidden, rows, torch.tensor(sequence[len(places) :])))
            reason = difference(inner, *logps)
        except PASS_ERRORS as error:  # a cache of something else than keys and values, as in latent attention
            reason = f"the pass with them failed: {error}"
        _reusable[inner] = reason is None
        if reason is not None:
            warnings.warn(
                f"{type(inner).__name__}: keys and values from sampling are not reused for judging (correct, but "
                f"slower): {reason}",
                stacklevel=3,
            )
    return _reusable[inner]


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
            gradients = [torch.autograd.grad(x.sum(), weights, materialize_grads=True) for x in (plain, ours)]
            expected, found = (torch.cat([part.float().flatten() for part in parts]) for parts in gradients)
            relative = float((expected - found).norm() / expected.norm().clamp_min(1e-12))
            if not relative <= max(0.01, tolerance(inner)):
                return f"a gradient differs by {relative:.1%}"
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

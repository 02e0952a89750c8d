"""Log-probabilities of tokens after contexts that share prefixes: for judges (no gradient) and for the loss.

Both run on `rlme.prefix_tree` where the model supports it, and on ordinary right-padded batches where it does
not or where `share=False`. The two give the same numbers up to rounding. A model's first use compares them
once; where they differ, sharing is off for that model from then on, with a warning that names the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlme.forward import forward_pass, forward_passes, head_of, length_kind, plan_passes
from rlme.gated_mlp import recomputed_gates
from rlme.key_values import HeldPrefix, KeyValues
from rlme.lm_head import LMHead, WholeLogits
from rlme.load_balance import RouterLogits
from rlme.prefix_tree import Ints
from rlme.sharing import CHECK_TOKENS, may_hold, may_reuse, may_share
from rlme.tree_attention import causal_lm, evaluating


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
        share = share and may_share(model, sequences, gradient=False)
        head = _head(model, sequences, share=share)
        places: list[Ints] = [np.empty(0, np.int64)] * len(sequences)
        kind = length_kind(model)
        crossing = kind is not None and any(kind(len(sequence)) for sequence in sequences)
        if known is not None and (crossing or not (known.tokens and share and sequences)):
            known = None
        # The last token of a context has to be computed: its hidden state is what the head reads.
        first_read = [min(len(contexts[asked[a][0]]) for a in readers[n]) - 1 for n in range(len(sequences))]
        if known is not None:
            places = [p[:end] for p, end in zip(known.find(sequences), first_read, strict=True)]
            longest = max(range(len(sequences)), key=lambda n: len(places[n]))
            if not len(places[longest]) or not may_reuse(model, sequences[longest], known, places[longest]):
                known, places = None, [p[:0] for p in places]
        # The head reads the hidden states of all passes together: its weights are read (and cast) once.
        states: list[Tensor] = []
        rows: list[int] = []  # for each token of each continuation, the row of `states` before it
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        kept = 0
        hold = share and known is None and may_hold(model, sequences, token_budget)
        for pack, forward in forward_passes(
            model,
            sequences,
            head,
            token_budget,
            share=share,
            read_from=first_read,
            known=known,
            places=places,
            hold=hold,
        ):
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
    held: HeldPrefix | None = None,
    gives_back: bool = False,
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

    `held` (`read_prefix`): what all rows begin with, not the whole prompt of any, which this pass need not compute; or,
    with `gives_back`, which it computes for the passes before it as well, after their backward passes.
    """
    prompts = [_as_tuple(ids) for ids in prompt_ids]
    completions = [_as_tuple(ids) for ids in completion_ids]
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: its first completion token has no context")
    # The last token is only read, unless routers are to be heard about it.
    sequences = [p + (c if routers else c[:-1]) for p, c in zip(prompts, completions, strict=True)]
    share = share and may_share(model, sequences, gradient=torch.is_grad_enabled())
    head = _head(model, sequences, share=share)
    filled: list[tuple[Tensor, Tensor | None]] = []
    where: list[Tensor] = []
    longest = max(map(len, completions), default=0)
    sparing = recomputed_gates(model) if share and torch.is_grad_enabled() else nullcontext()
    with sparing, routers.listening(model) if routers else nullcontext():
        if held is not None:
            given: dict[str, Any] = {"known": held, "places": [held.positions] * len(sequences)}
            given = {"gives_back": held} if gives_back else given
            passes = iter([(list(range(len(sequences))), forward_pass(model, sequences, head, share=True, **given))])
        else:
            hold = share and routers is None and may_hold(model, sequences, token_budget)
            read_from = [len(prompt) - 1 for prompt in prompts]
            passes = forward_passes(model, sequences, head, token_budget, share=share, read_from=read_from, hold=hold)
        for pack, forward in passes:
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
                hidden = hidden.float() if float32_head else hidden
                filled.append(head.logps(hidden, wanted, temperature, compute_entropy))
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
    share = share and may_share(model, sequences, gradient=True)
    return plan_passes(sequences, token_budget, share=share, kind=length_kind(model))


@torch.no_grad()
def read_prefix(model: nn.Module, ids: Sequence[int] | Tensor) -> HeldPrefix:
    """The keys and values of what several packs of rows begin with, for `completion_logps` of each of them.

    Autocast is the caller's, in a context of its own: weights that it casts in here have no gradient.
    """
    inner = causal_lm(model)  # whose distributed wrapper would wait for other processes
    held = HeldPrefix(_as_tuple(ids), gradient=True)
    forward_pass(inner, [held.text], LMHead(inner), share=True, keep=held)
    return held


def _as_tuple(ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(ids.tolist() if isinstance(ids, Tensor) else ids)


def _head(model: nn.Module, sequences: Sequence[Sequence[int]], *, share: bool) -> LMHead | WholeLogits:
    """What reads the hidden states. With shared prefixes it has been compared together with them."""
    if share or not sequences:
        return LMHead(causal_lm(model))
    return head_of(model, max(sequences, key=len)[:CHECK_TOKENS])

"""Grouped sampling: each prompt is read once, its completions are written together, finished rows leave the
batch.

For machines where vLLM is not an option. Any causal model works (`rlme.decoding`); where the model lets us, our
attention reads its cache (`rlme.prompt_groups`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlme.cast_weights import weights_in
from rlme.decoding import begin, left_padded, mixes_lengths
from rlme.forward import length_kind
from rlme.key_values import KeyValues
from rlme.packed_linear import packed_linears
from rlme.tree_attention import causal_lm, check_adapter, device_of, evaluating

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed first when one is drawn
COMPACT_BELOW = 7 / 8  # finished rows are dropped from the cache once fewer rows than this share are active


@dataclass(slots=True)
class Sampled:
    """One completion.

    `ids`: its tokens, the end-of-sequence token included where it ended with one. `logprobs`: for each token,
    its log-probability (float32) under the distribution it was drawn from, that is after repetition penalty,
    temperature and truncation, renormalised; at temperature 0 under the distribution at temperature 1.
    `finished`: it ended by itself, with an end-of-sequence token or a stop string, before `max_new_tokens`.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    max_rows: int = 256,
    on_finished: Callable[[int, int, Sampled], None] | None = None,
    keep: KeyValues | None = None,
) -> list[list[Sampled]]:
    """Draw `n` (or `n[i]`) completions for each prompt.

    The filters are transformers' own, in the order of `generate`. A stop string ends the completion that it is in. The
    same seed gives the same completions,
    whatever the other rows do: each row draws from its own stream of uniform numbers (seed, prompt,
    completion). Temperature 0 is greedy and equals `generate`.

    `dtype` (bfloat16, say) runs on cast weights, held beside the model's own for the length of the call; on a CPU
    weights are held once more (`rlme.packed_linear`). At most `max_rows` completions are written at once.
    Dropout is off. `keep` takes the keys and values of what was read and written, where the cache holds them whole
    (not for sliding windows).

    `on_finished(prompt, completion, sampled)` is called as soon as nothing will be added to a completion, while others
    are still written.
    """
    check_adapter(model)
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    if len(counts) != len(prompts):
        raise ValueError(f"n has {len(counts)} entries for {len(prompts)} prompts")
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: there is nothing to continue")
    stop = None
    if stop_strings:
        if tokenizer is None:
            raise ValueError("stop strings need the tokenizer")
        stop = StopStringCriteria(tokenizer, list(stop_strings))
    for name, value, right, expected in (
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("top_k", top_k, top_k >= 0, "at least 0 (off)"),
        ("min_p", min_p, 0 <= min_p <= 1, "0 (off) to 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ("max_rows", max_rows, max_rows >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "at least 0"),
    ):
        if not right:
            raise ValueError(f"{name} is {value}, expected {expected}")
    processors = _processors(temperature, top_p, top_k, min_p, repetition_penalty)
    eos = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long)
    results = [[Sampled() for _ in range(count)] for count in counts]
    rows = [(p, c) for p, count in enumerate(counts) for c in range(count)]
    with torch.no_grad(), evaluating(model), weights_in(model, dtype), packed_linears(model):
        for batch in _batches(causal_lm(model), prompts, rows, max_rows):
            noise = np.stack([np.random.default_rng([seed, p, c]).random(max_new_tokens) for p, c in batch])

            def finished(row: int, batch: list[tuple[int, int]] = batch) -> None:
                if on_finished is not None:
                    p, c = batch[row]
                    on_finished(p, c, results[p][c])

            _sample_batch(
                causal_lm(model),
                [prompts[p] for p, _ in batch],
                [results[p][c] for p, c in batch],
                torch.from_numpy(noise),
                greedy=temperature == 0,
                processors=processors,
                eos=eos,
                stop=stop,
                on_finished=finished,
                keep=keep,
            )
    return results


def length_to_stop(ids: Sequence[int], stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Number of tokens of a completion after which its text first holds a stop string; None where it holds none."""

    def holds(length: int) -> bool:
        text = tokenizer.decode(ids[:length])
        return any(stop in text for stop in stop_strings)

    return bisect_left(range(len(ids) + 1), True, key=holds) if holds(len(ids)) else None


class Nucleus(TopPLogitsWarper):
    """transformers' top-p without sorting the vocabulary, which costs as much as the rest of a step on a CPU: the
    `HEAD` most likely tokens nearly always hold the nucleus. Where they do not, all are sorted as there."""

    HEAD = 512

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits [R, V] with those outside the nucleus at -inf (equal logits stay or go together)."""
        if _refuses_running_sums(scores.device):
            return cast(torch.FloatTensor, self(input_ids, cast(torch.FloatTensor, scores.cpu())).to(scores.device))
        top, _ = scores.topk(min(self.HEAD, scores.shape[-1]), dim=-1)
        probabilities = (top - scores.logsumexp(-1, keepdim=True)).exp()
        cumulative = probabilities.cumsum(-1)
        if bool((cumulative[:, -1] < self.top_p).any()):
            return cast(torch.FloatTensor, super().__call__(input_ids, scores))
        inside = (cumulative - probabilities) < self.top_p
        last = top.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        return cast(torch.FloatTensor, scores.masked_fill(scores < last, self.filter_value))


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: list[tuple[int, int]], max_rows: int
) -> Iterator[list[tuple[int, int]]]:
    """At most `max_rows` of the rows (prompt, completion) at a time, which may be written together."""
    kind = length_kind(model) or (lambda length: 0)
    if rows and not mixes_lengths(model, max(prompts, key=len)):
        kind = int  # each length apart
    together: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        together.setdefault(kind(len(prompts[row[0]])), []).append(row)
    for some in together.values():
        for start in range(0, len(some), max_rows):
            yield some[start : start + max_rows]


def _processors(
    temperature: float, top_p: float, top_k: int, min_p: float, repetition_penalty: float
) -> LogitsProcessorList:
    """What changes the logits before sampling, in the order of `generate`."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature == 0:
        return processors
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(Nucleus(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    return processors


def _sample_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    results: list[Sampled],
    noise: Tensor,
    *,
    greedy: bool,
    processors: LogitsProcessorList,
    eos: Tensor,
    stop: StopStringCriteria | None,
    on_finished: Callable[[int], None],
    keep: KeyValues | None,
) -> None:
    """Complete R rows together, into `results`. `noise[R, max_new_tokens]` is uniform in [0, 1)."""
    device = device_of(model)
    # Apple's GPUs have no float64: tokens are chosen on the CPU there.
    eos = eos.to(device)
    noise = noise.to("cpu" if device.type == "mps" or _refuses_running_sums(device) else device)
    ids = left_padded(prompts, device)
    prompted = ids.shape[1]
    writing = begin(model, prompts)
    rows = list(range(len(prompts)))  # the entry of `results` that each row of the batch writes
    active = [True] * len(rows)

    def hold(leaving: list[int]) -> None:
        """Keep the keys and values of these rows of the batch; their last token was never read."""
        if keep is not None:
            members = [(prompts[rows[i]], results[rows[i]].ids[:-1]) for i in leaving]
            writing.hold(keep, torch.tensor(leaving, device=device), members)

    for step in range(noise.shape[1]):
        tokens, logprobs = _draw(
            processors(cast(torch.LongTensor, ids), writing.logits.float()), noise[:, step], greedy=greedy
        )
        ids = torch.cat([ids, tokens[:, None]], 1)
        ended = torch.isin(tokens, eos)
        if stop is not None:  # in the completion alone: neither its prompt nor padding ends it
            ended |= stop(cast(torch.LongTensor, ids[:, prompted:]), writing.logits)
        # Brought over together, as a GPU waits each time; float32 holds every token below 2**24.
        drawn = torch.stack([tokens.float(), logprobs, ended.float()]).tolist()
        for i, (token, logprob, has_ended) in enumerate(zip(*drawn, strict=True)):
            if math.isnan(logprob):
                raise FloatingPointError("the model's logits are not numbers: nothing can be sampled from it")
            if active[i]:
                result = results[rows[i]]
                result.ids.append(int(token))
                result.logprobs.append(logprob)
                result.finished = bool(has_ended)
                active[i] = not has_ended
                if has_ended or step + 1 == noise.shape[1]:
                    on_finished(rows[i])
        stay = [i for i, still in enumerate(active) if still]
        if not stay or step + 1 == noise.shape[1]:
            hold(list(range(len(rows))))
            return
        if len(stay) <= COMPACT_BELOW * len(rows):
            hold([i for i, still in enumerate(active) if not still])
            kept = torch.tensor(stay, device=device)
            writing.select(kept)
            ids, noise = ids[kept], noise[kept.to(noise.device)]
            rows, active = [rows[i] for i in stay], [True] * len(stay)
        writing.step(ids[:, -1])


def _refuses_running_sums(device: torch.device) -> bool:
    """Where PyTorch was asked for the same numbers each time (TRL's `full_determinism`), a GPU has no `cumsum`."""
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def _draw(scores: Tensor, uniform: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token per row of `scores[R, V]` and its log-probability: the arg max, or by inverting the distribution. NaN
    where the scores are not numbers."""
    probabilities = scores.softmax(-1)
    if greedy:
        tokens = scores.argmax(-1)
    else:
        # First a block of the vocabulary, then a token in it: one running sum over all of it is several times slower.
        spare = -scores.shape[-1] % BLOCK
        padded = nn.functional.pad(probabilities, (0, spare)) if spare else probabilities
        blocks = padded.view(len(scores), -1, BLOCK)
        block, rest = _invert(blocks.sum(-1), uniform)
        inside, _ = _invert(blocks[torch.arange(len(block), device=scores.device), block.to(scores.device)], rest)
        tokens = (block * BLOCK + inside).to(scores.device).clamp(max=scores.shape[-1] - 1)  # NaN are past the end
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of `weights[R, N]`: the entry that `uniform`[R] in [0, 1) falls on, and where within it, in [0, 1].

    An entry of weight 0 is never chosen. Computed, in float64, where `uniform` is.
    """
    weights = weights.to(uniform.device, torch.float64)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may bring the product up to the sum itself, past the last entry that has weight.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(1, chosen)
    below = cumulative.gather(1, chosen) - weight
    return chosen[:, 0], ((target - below) / weight).clamp(0, 1)[:, 0]

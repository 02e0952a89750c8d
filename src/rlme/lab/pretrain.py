"""Pretraining of the lab's models from scratch: `rlme lab build`.

One thread, seeds fixed, a set number of steps. Attention starts with three heads of the first layer that look one, two
and three tokens back (as trained models have them), and embeddings with digits and lengths near their like; all else
starts at random. While the model trains, a linear probe reads from the hidden state behind each step whether it and all
steps so far are right; its loss reaches the model, the probe itself is thrown away.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from rlme.lab.corpus import END, Drills, Mixture, Part, Weights, draw_document, draw_drill
from rlme.lab.tokenizer import EOS, PAD, encode, vocabulary


@dataclass(frozen=True)
class Stage:
    """Steps on one mixture of documents, the learning rate up to its peak and down again."""

    steps: int
    mixture: Mixture = field(default_factory=Mixture)
    peak: float = 1.0
    """Of the plan's learning rates."""
    level: float = 0.4
    """Share of the steps at the peak."""


CLOSER = Stage(2500, Mixture(guesses=0.12, faults=(0.0, 1.0, 5.0, 5.0)), peak=0.5, level=0.2)
"""A closer look: more faults, and guesses that are no more than that."""


@dataclass(frozen=True)
class Plan:
    """One model and how it is trained."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    stages: tuple[Stage, ...] = (Stage(2500), CLOSER)
    documents: int = 24
    """Documents a step."""
    learning_rate: float = 2e-3
    matrix_rate: float = 0.02
    drill_steps: int = 300
    drills_first: float = 1.0
    """Share of drills in the first `drill_steps` steps of all; `drills` afterwards."""
    drills: float = 0.2
    drilled: Drills = field(default_factory=Drills)
    seed: int = 1
    weights: Weights = field(default_factory=Weights)


def new_model(plan: Plan) -> Any:
    """A Llama of the plan's size with freshly drawn weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=plan.hidden,
        intermediate_size=2 * plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.1)
        _order_numbers(model.model.embed_tokens.weight)
        _look_back(model.model.layers[0].self_attn, plan.hidden // plan.heads, min(3, plan.heads - 1))
    return model


def _order_numbers(embedding: torch.Tensor) -> None:
    """Numbers begin near their neighbours, so that lengths seldom seen in the corpus can still be compared."""
    known = vocabulary()
    for word, i in known.items():  # with and without a space before it
        if f" {word}" in known:
            embedding[i] = embedding[known[f" {word}"]]
    direction = torch.randn(4, embedding.shape[1]) * 0.1
    for n in range(10, 401):
        angle = n / 400
        waves = torch.tensor([angle, math.sin(3 * angle), math.sin(8 * angle), math.cos(8 * angle)])
        embedding[known[f" {n}"]] = waves @ direction + 0.2 * embedding[known[f" {n}"]]


def _look_back(attention: Any, width: int, heads: int) -> None:
    """Rotary attention whose query and key biases peak at a distance of 1, 2, ... tokens."""
    half = width // 2
    theta = 10000.0 ** (-torch.arange(half) / half)
    read = torch.linalg.qr(torch.randn(attention.v_proj.weight.shape[1], width))[0].T
    used, strength = half * 3 // 8, 6.5
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        attention.q_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows] *= 0.1
        query, key = torch.zeros(width), torch.zeros(width)
        query[:used] = strength
        key[:used] = strength * torch.cos((head + 1) * theta[:used])
        key[half : half + used] = strength * torch.sin((head + 1) * theta[:used])
        attention.v_proj.weight[rows] = read
        attention.o_proj.weight[:, rows] = 0.3 * torch.linalg.qr(torch.randn(read.shape[1], width))[0]
        attention.q_proj.bias[rows] = query
        attention.k_proj.bias[rows] = key


@dataclass
class Batch:
    """Token ids, the tokens to predict there, their weights in the loss, and (else -1) whether a step and all steps so
    far are right: documents x tokens."""

    ids: torch.Tensor
    due: torch.Tensor
    weights: torch.Tensor
    right: torch.Tensor
    so_far: torch.Tensor


Encoded = tuple[list[int], list[int], list[float], list[int], list[int]]


def batches(plan: Plan, number: int) -> Iterator[Batch]:
    """Documents of similar length stand together, among few: a batch of one kind alone would pull the model its way."""
    rng = random.Random(plan.seed + 7 + 1000 * number)
    mixture = plan.stages[number].mixture
    seen = 0 if number == 0 else plan.drill_steps * plan.documents
    while True:
        pool = []
        for _ in range(plan.documents * 30):
            drills = plan.drills_first if seen < plan.drill_steps * plan.documents else plan.drills
            drill = rng.random() < drills
            parts = draw_drill(rng, plan.drilled, plan.weights) if drill else draw_document(rng, mixture, plan.weights)
            pool.append(_encoded(parts, plan))
            seen += 1
        window = 3 * plan.documents
        pool = [d for i in range(0, len(pool), window) for d in sorted(pool[i : i + window], key=lambda d: len(d[0]))]
        starts = list(range(0, len(pool), plan.documents))
        rng.shuffle(starts)
        for start in starts:
            part = pool[start : start + plan.documents]
            longest = max(len(d[0]) for d in part)
            padded = [
                [list(row) + [fill] * (longest - len(row)) for row in column]
                for column, fill in zip(zip(*part, strict=True), (PAD, PAD, 0.0, -1, -1), strict=True)
            ]
            yield Batch(*(torch.tensor(rows) for rows in padded))


def _encoded(parts: list[Part], plan: Plan) -> Encoded:
    """A document as tokens. After the solution the model is to end its text, though the evaluation follows there."""
    ids: list[int] = []
    due: list[int] = []
    weights: list[float] = []
    right: list[int] = []
    so_far: list[int] = []
    ends = False
    for part in parts:
        if part.weight == END:
            ends = True
            continue
        tokens = encode(part.text)
        if not tokens:
            continue
        ids += tokens
        due += [EOS, *tokens[1:]] if ends else tokens
        weights += [plan.weights.solution, *[part.weight] * (len(tokens) - 1)] if ends else [part.weight] * len(tokens)
        for known, truth in ((right, part.right), (so_far, part.so_far)):
            known += [-1] * (len(tokens) - 1) + [-1 if truth is None else int(truth)]
        ends = False
    return ids, due, weights, right, so_far


def pretrain(
    plan: Plan,
    report: Callable[[str], None] = print,
    *,
    every: int = 100,
    watch: Callable[[int, Any], None] = lambda step, model: None,
) -> Any:
    """Train a model as planned. `report` gets a line every so many steps, `watch` the model after each."""
    model = new_model(plan)
    for number in range(len(plan.stages)):
        train_stage(plan, number, model, report, every=every, watch=watch)
    return model.eval()


def train_stage(
    plan: Plan,
    number: int,
    model: Any,
    report: Callable[[str], None],
    *,
    every: int,
    watch: Callable[[int, Any], None] = lambda step, model: None,
) -> None:
    """One stage; it takes over the weights of the one before and nothing else."""
    stage = plan.stages[number]
    if number:
        torch.manual_seed(plan.seed + number)
    probe = torch.nn.Linear(plan.hidden, 2)
    optimizers = _optimizers(plan, model, probe)
    source = batches(plan, number)
    started, tokens = time.perf_counter(), 0
    history: dict[str, list[float]] = {"steps": [], "so far": [], "verdicts": [], "solutions": []}
    for step in range(stage.steps):
        batch = next(source)
        share = step / stage.steps
        rate = 1.0 if share < stage.level else max(0.02, (1 - share) / (1 - stage.level))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * stage.peak * rate * min(1.0, (step + 1) / 50)
        loss, parts = _loss(plan, model, probe, batch)
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        tokens += int(batch.ids.numel())
        for name, value in parts.items():
            history[name] = [*history[name][1 - every :], value] if not math.isnan(value) else history[name]
        if (step + 1) % every == 0:
            seconds = time.perf_counter() - started
            means = ", ".join(f"{name} {sum(v) / max(1, len(v)):.3f}" for name, v in history.items())
            where = f"stage {number + 1}, step {step + 1}/{stage.steps}"
            report(f"{where}, {seconds:.0f} s, {tokens / seconds:.0f} tokens/s, {means}")
        watch(step + 1, model)


def _optimizers(plan: Plan, model: Any, probe: Any) -> list[tuple[Any, float]]:
    """Muon for matrices, AdamW for the rest, each with its peak learning rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n] + list(probe.parameters())
    muon = torch.optim.Muon(matrices, lr=plan.matrix_rate, momentum=0.95, weight_decay=0.01, ns_steps=4)
    adam = torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, plan.matrix_rate), (adam, plan.learning_rate)]


def _loss(plan: Plan, model: Any, probe: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The weighted mean of token losses plus the probe's; the means by kind, for the report."""
    due, weights = batch.due[:, 1:], batch.weights[:, 1:]
    kept = weights > 0
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    losses = cross_entropy(model.lm_head(hidden[:, :-1][kept]), due[kept], reduction="none")
    weight = weights[kept]
    loss = (losses * weight).sum() / weight.sum()
    parts = {
        "steps": math.nan,
        "so far": math.nan,
        "verdicts": losses[weight == plan.weights.verdict].detach().mean().item(),
        "solutions": losses[weight == plan.weights.solution].detach().mean().item(),
    }
    for i, (name, truth) in enumerate((("steps", batch.right), ("so far", batch.so_far))):
        asked = truth >= 0
        if asked.any():
            probed = binary_cross_entropy_with_logits(probe(hidden[asked])[:, i], truth[asked].float())
            loss = loss + plan.weights.probe * probed
            parts[name] = probed.item()
    return loss, parts

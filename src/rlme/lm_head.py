"""The LM head on chosen positions only, in chunks: no [tokens, vocabulary] tensor of logits exists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

VOCABULARY_CHUNK = 16384
ROW_CHUNK = 512  # rows of logits that exist at a time
TILE = 100_000_000  # logits that the blocked loss holds at a time, in the compute dtype
BLOCK = 8  # rows of them, as float32, in the cache at a time


class _BlockedLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies of targets, for processors without Triton.

    The mathematics of TRL's `ChunkedLogProbFunction`, which stays in use on GPUs, arranged for a cache
    hierarchy: a tile of at most `TILE` logits [rows, V] is visited in blocks of `BLOCK` rows that fit into the
    cache, in float32, and the products of the backward pass run in the compute dtype (TRL's run in float32 here,
    at half the speed). Tensors of the weight's size are made as seldom as can be: for a small model, adding up
    its gradient over many tiles costs as much as computing it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        scale: float,
        softcap: float | None,
        compute_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        ctx.numbers = temperature, scale, softcap
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        normaliser, entropy = torch.empty_like(logps), torch.zeros_like(logps)
        cast = weight.to(ctx.dtype)
        rows = max(BLOCK, TILE // len(cast))
        tile: Tensor | None = None
        for first in range(0, len(hidden), rows):
            tile = None  # there is room for one
            tile = _tile(hidden[first : first + rows].to(ctx.dtype), cast, bias)
            for start in range(0, len(tile), BLOCK):
                block = slice(first + start, first + min(start + BLOCK, len(tile)))
                z, _ = _scaled(tile[start : start + BLOCK].to(torch.float32, copy=True), *ctx.numbers)
                picked = z.gather(1, targets[block, None])[:, 0]
                logp = z.log_softmax(-1)
                logps[block] = logp.gather(1, targets[block, None])[:, 0]
                normaliser[block] = picked - logps[block]
                if compute_entropy:
                    # Not `vecdot`: autocast takes it in bfloat16.
                    entropy[block] = -logp.exp().mul_(logp).sum(-1)
        # The backward pass begins where this one ends, with a tile: the last one waits for it, at no higher peak.
        ctx.cast, ctx.rows, ctx.tile = cast, rows, tile
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        return logps, entropy if compute_entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        cast, tile, ctx.tile = ctx.cast, ctx.tile, None
        for first in reversed(range(0, len(hidden), ctx.rows)):
            chunk = hidden[first : first + ctx.rows].to(ctx.dtype)
            if tile is None:
                tile = _tile(chunk, cast, bias)
            for start in range(0, len(tile), BLOCK):
                block = slice(first + start, first + min(start + BLOCK, len(tile)))
                z, slope = _scaled(tile[start : start + BLOCK].float(), *ctx.numbers)
                logp = z.sub_(normaliser[block, None])
                factor = -grad_logps[block, None]  # d logp_t / dz_j = [j = t] - p_j
                if grad_entropy is not None and bool(grad_entropy[block].any()):
                    # d entropy / dz_j = -p_j (log p_j + entropy)
                    factor = factor - grad_entropy[block, None] * (logp + entropy[block, None])
                grad = logp.exp_().mul_(factor)
                grad.scatter_add_(1, targets[block, None], grad_logps[block, None])
                tile[start : start + BLOCK] = grad.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[first : first + ctx.rows] = tile @ cast
            if needs_weight:
                product = (tile.t() @ chunk).to(weight.dtype)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            if grad_bias is not None:
                grad_bias += tile.sum(0, dtype=torch.float32)
            tile = None
        if needs_weight and grad_weight is None:  # no token at all
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _tile(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))


def _scaled(logits: Tensor, temperature: float, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits as they are sampled from, and the derivative of that; `logits` is overwritten."""
    if softcap is None:
        factor = scale / temperature
        return (logits.mul_(factor) if factor != 1.0 else logits), factor
    bounded = logits.mul_(scale / softcap).tanh_()
    slope = (1 - bounded * bounded).mul_(scale / temperature)
    return bounded.mul_(softcap / temperature), slope


class LMHead:
    """A model's LM head with what its architecture does to logits: scale, then soft cap.

    The configuration keys are those of transformers 5.23 (Gemma 2 and 3: `final_logit_softcapping`; Cohere,
    Granite, Falcon-H1 and others: a scale under different names; RecurrentGemma and xLSTM: soft caps of other names).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        config = model.config.get_text_config()
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self.softcap: float | None = next((cap for cap in (getattr(config, key, None) for key in caps) if cap), None)
        scales = [getattr(config, key, None) for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        self.scale: float = next((scale for scale in scales if scale is not None), 1.0)
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None and config.model_type != "minicpm3":  # which divides what it calls the head on
            self.scale = divisor if config.model_type == "hyperclovax" else 1 / divisor

    def _gathered(self) -> AbstractContextManager[object]:
        """Whole weights under DeepSpeed ZeRO-3; nothing otherwise."""
        if type(self.head) is not nn.Linear:
            return nullcontext()
        parameters: Any = (self.head.weight, self.head.bias)
        context: AbstractContextManager[object] = maybe_gather_lm_head_ctx(*parameters)
        return context

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; FSDP2 holds them as shards and gathers them here."""
        weight, bias = self.head.weight, self.head.bias
        if hasattr(weight, "full_tensor"):
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        return weight, bias

    def _transform(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def read(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Float32 log-probability of `targets[N]` at `hidden[rows[N]]`; a row read for several targets is one
        row.

        Logits that are asked for are float32 also for a bfloat16 model: bfloat16 numbers near 20 are 0.1 apart. The
        others, which only the normaliser needs, are computed as differences from these: rounding then costs at most
        0.2 % of how far apart they are.
        """
        unique, back = torch.unique(rows.to(hidden.device), return_inverse=True)
        targets = targets.to(hidden.device)
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        with self._gathered(), torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(unique), ROW_CHUNK):
                chunk = hidden.index_select(0, unique[start : start + ROW_CHUNK])
                mine = ((back >= start) & (back < start + ROW_CHUNK)).nonzero()[:, 0]
                result[mine] = self._read_chunk(chunk, back[mine] - start, targets[mine])
        return result

    def _read_chunk(self, hidden: Tensor, back: Tensor, targets: Tensor) -> Tensor:
        if type(self.head) is not nn.Linear:  # an adapter on the head: its weight alone says too little
            parameter = next(self.head.parameters())
            logits = self._transform(self.head(hidden.to(parameter.dtype)).float())
            return logits[back, targets] - logits.logsumexp(-1)[back]
        weight, bias = self._weights()
        dtype = weight.dtype if hidden.dtype == weight.dtype else torch.float32
        picked = (hidden.float()[back] * weight[targets].float()).sum(-1)
        if bias is not None:
            picked += bias[targets].float()
        # The most likely of a row's targets, as a number that the products' dtype holds exactly.
        reference = picked.new_full((len(hidden),), float("-inf")).scatter_reduce_(0, back, picked, "amax").to(dtype)
        hidden = hidden.to(dtype)
        normaliser = torch.full_like(reference, float("-inf"), dtype=torch.float32)
        for start in range(0, len(weight), VOCABULARY_CHUNK):
            part = slice(start, start + VOCABULARY_CHUNK)
            difference = torch.addmm(-reference[:, None], hidden, weight[part].to(dtype).t()).float()
            if bias is not None:
                difference += bias[part].float()
            logits = self._transform(difference + reference[:, None])
            # log sum exp, at a tenth of the time that `logsumexp` takes on a CPU
            part_sum = logits.amax(-1) - logits.log_softmax(-1).amax(-1)
            normaliser = torch.logaddexp(normaliser, part_sum)
        return self._transform(picked) - normaliser[back]

    def logps(
        self, hidden: Tensor, targets: Tensor, temperature: float, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (and entropies) [N], float32, of `targets[N]` after `hidden[N, D]`;
        differentiable.
        """
        targets = targets.to(hidden.device)
        if type(self.head) is not nn.Linear:
            pieces = [
                checkpoint(self._logps_through_module, h, t, temperature, use_reentrant=False)
                for h, t in zip(torch.split(hidden, ROW_CHUNK), torch.split(targets, ROW_CHUNK), strict=True)
            ]
            logps, entropy = (torch.cat(part) for part in zip(*pieces, strict=True))
            return logps, entropy if compute_entropy else None
        with self._gathered():
            weight, bias = self._weights()
            function: Any = ChunkedLogProbFunction
            if hidden.device.type in ("cuda", "xpu"):
                outputs = ("entropy",) if compute_entropy else ()
                logps, entropy, *_ = function.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    VOCABULARY_CHUNK,
                    self.softcap,
                    self.scale,
                    outputs,
                )
            else:
                function = _BlockedLogProbs
                logps, entropy = function.apply(
                    hidden, weight, bias, targets, temperature, self.scale, self.softcap, compute_entropy
                )
        return logps, entropy

    def _logps_through_module(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logps = (self._transform(self.head(hidden).float()) / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy


class WholeLogits:
    """In place of `LMHead` where the logits are more than its projection: "hidden states" are then the logits."""

    @torch.no_grad()
    def read(self, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Float32 log-probability of `targets[N]` at `logits[rows[N]]`."""
        unique, back = torch.unique(rows.to(logits.device), return_inverse=True)
        return logits[unique].float().log_softmax(-1)[back, targets.to(logits.device)]

    def logps(
        self, logits: Tensor, targets: Tensor, temperature: float, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (and entropies) [N], float32, of `targets[N]` under `logits[N, V]`; differentiable."""
        logps = (logits.float() / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1) if compute_entropy else None
        return logps.gather(-1, targets.to(logits.device)[:, None])[:, 0], entropy

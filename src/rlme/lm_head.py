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
ROW_CHUNK = 1024


class LMHead:
    """A model's LM head with what its architecture does to logits: scale, then soft cap.

    The configuration keys are those of transformers 5.23 (Gemma 2 and 3: `final_logit_softcapping`; Cohere,
    Granite, Falcon-H1 and others: a scale under different names).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        scales = [
            getattr(config, key, None) for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")
        ]
        self.scale: float = next((scale for scale in scales if scale is not None), 1.0)
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
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

        The product is taken in float32 also for a bfloat16 model: bfloat16 logits near 20 are 0.1 apart.
        """
        unique, back = torch.unique(rows.to(hidden.device), return_inverse=True)
        targets = targets.to(hidden.device)
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        with self._gathered(), torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(unique), ROW_CHUNK):
                chunk = hidden.index_select(0, unique[start : start + ROW_CHUNK]).float()
                mine = ((back >= start) & (back < start + ROW_CHUNK)).nonzero()[:, 0]
                result[mine] = self._read_chunk(chunk, back[mine] - start, targets[mine])
        return result

    def _read_chunk(self, hidden: Tensor, back: Tensor, targets: Tensor) -> Tensor:
        if type(self.head) is not nn.Linear:  # an adapter on the head: its weight alone says too little
            parameter = next(self.head.parameters())
            logits = self._transform(self.head(hidden.to(parameter.dtype)).float())
            return logits[back, targets] - logits.logsumexp(-1)[back]
        weight, bias = self._weights()
        normaliser = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        picked = torch.zeros(len(targets), device=hidden.device)
        for start in range(0, len(weight), VOCABULARY_CHUNK):
            stop = min(start + VOCABULARY_CHUNK, len(weight))
            part = None if bias is None else bias[start:stop].float()
            logits = self._transform(nn.functional.linear(hidden, weight[start:stop].float(), part))
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1))
            here = (targets >= start) & (targets < stop)
            picked = torch.where(here, logits[back, (targets - start).clamp(0, stop - start - 1)], picked)
        return picked - normaliser[back]

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
            outputs = ("entropy",) if compute_entropy else ()
            arguments = temperature, VOCABULARY_CHUNK, self.softcap, self.scale, outputs
            apply: Any = ChunkedLogProbFunction.apply
            logps, entropy, *_ = apply(hidden, weight, bias, targets, *arguments)
        return logps, entropy

    def _logps_through_module(
        self, hidden: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logps = (self._transform(self.head(hidden).float()) / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy

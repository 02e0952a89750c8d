"""Mixture-of-experts models: the loss that keeps their experts evenly used, over passes that share prefixes.

What Switch Transformer (arXiv 2101.03961, equations 4 to 6) adds to the loss is a mean over tokens. A token that is
computed once for several rows counts once for each of them, so that the value is that of the padded batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlme.prefix_tree import Ints
from rlme.tree_attention import causal_lm


def prepare_mixture(model: Any) -> None:
    """Settle what a mixture's configuration leaves open (any other model's stays as it is).

    Router logits are told where they are asked for: a model that always tells them sums its own balance in every pass,
    over a mask that passes of shared prefixes do not have. `num_experts` names the number of experts, where TRL's
    trainers read it: some families (Granite, Phi, JetMoE, DeepSeek V4) have another name for it.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return
    config.output_router_logits = False
    if not hasattr(config, "num_experts"):
        names: dict[str, str] = type(config).attribute_map
        for name in ("num_local_experts", "n_routed_experts"):
            if hasattr(config, name):
                type(config).attribute_map = {**names, "num_experts": names.get(name, name)}
                return


class RouterLogits:
    """The router logits of forward passes."""

    def __init__(self) -> None:
        self._passes: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._heard: list[tuple[Tensor, ...]] = []

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Inside, a forward pass of the model leaves its router logits here.

        The backbone is asked for them, not the model: that would add a loss of its own, over the wrong tokens.
        """
        backbone: Any = causal_lm(model).base_model

        def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "output_router_logits": True}

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            self._heard.append(tuple(getattr(output, "router_logits", None) or ()))

        hooks = [backbone.register_forward_pre_hook(ask, with_kwargs=True), backbone.register_forward_hook(hear)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, paths: list[Ints], positions: int) -> None:
        """The pass that was heard last: where in its `positions` the tokens of each row lie."""
        layers = self._heard.pop()
        times = np.bincount(np.concatenate(paths), minlength=positions)
        if layers:
            self._passes.append((layers, torch.from_numpy(times).to(layers[0].device, torch.float32)))

    def loss(self, top_k: int) -> Tensor | None:
        """`experts * sum_e (share of assignments to e) * (mean probability of e)`, all layers and tokens together, with
        `top_k` experts for a token; 1 is even, times `top_k`. None where the model told no router logits."""
        if not self._passes:
            return None
        assigned: Any = 0.0
        probability: Any = 0.0
        total: Any = 0.0
        for layers, times in self._passes:
            for logits in layers:
                weights = logits.reshape(len(times), -1).softmax(-1)
                chosen = weights.topk(top_k, dim=-1).indices.flatten()
                counts = times.new_zeros(weights.shape[-1])
                assigned = assigned + counts.index_add(0, chosen.to(times.device), times.repeat_interleave(top_k))
                probability = probability + times @ weights.float().to(times.device)
                total = total + times.sum()
        return len(assigned) * (assigned / total) @ (probability / total)

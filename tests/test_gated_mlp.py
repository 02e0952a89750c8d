"""Gated MLPs keep less for the backward pass; outputs and gradients are the same to the last bit."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.activations import NewGELUActivation

from rlme.gated_mlp import recomputed_gates
from rlme.scoring import completion_logps

PROMPTS = [[40, 41, 42, 43, 44, 45]] * 3
ANSWERS = [[50, 51, 52, 53], [60], [70, 71, 72]]


class OwnActivation(nn.Module):
    """One that autocast computes in float32, and whose own parameter learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.softplus(x)


def with_activation(model: Any, activation: nn.Module) -> Any:
    for layer in model.model.layers:
        layer.mlp.act_fn = copy.deepcopy(activation)
    return model


def with_adapter(model: Any, dropout: float) -> Any:
    adapter = LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "gate_proj", "down_proj"])
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


VARIANTS = {
    "plain": lambda model: model,
    "gelu with powers": lambda model: with_activation(model, NewGELUActivation()),
    "own activation": lambda model: with_activation(model, OwnActivation()),
    "lora": lambda model: with_adapter(model, 0.0),
    "lora with dropout": lambda model: with_adapter(model, 0.3),
}


class Inside:
    """Whether what the MLPs activate and multiply is in memory still, one of each for every layer."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[StorageWeakRef] = []
        for module in model.modules():
            if hasattr(module, "act_fn"):
                module.act_fn.register_forward_hook(lambda module, args, output: self.see(output))
                module.down_proj.register_forward_pre_hook(lambda module, args: self.see(args[0]))

    def see(self, tensor: torch.Tensor) -> None:
        self.seen.append(StorageWeakRef(tensor.untyped_storage()))

    def alive(self) -> int:
        return sum(not one.expired() for one in self.seen)


def gradient(model: Any, *, bfloat16: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Log-probabilities, gradients of all weights that learn, and how many inner tensors waited for them."""
    model.zero_grad()
    torch.manual_seed(3)
    inside = Inside(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logps, _ = completion_logps(model, PROMPTS, ANSWERS)
    waiting = inside.alive()
    logps.sum().backward()
    return logps.detach(), [p.grad for p in model.parameters() if p.requires_grad], waiting


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_last_bit(tiny_dir, variant, bfloat16, monkeypatch):
    torch.manual_seed(1)
    model = VARIANTS[variant](AutoModelForCausalLM.from_pretrained(tiny_dir)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    gradient(model, bfloat16=bfloat16)  # compares shared prefixes with whole sequences, once
    logps, grads, waiting = gradient(model, bfloat16=bfloat16)
    monkeypatch.setattr("rlme.scoring.recomputed_gates", lambda model: nullcontext())
    expected_logps, expected_grads, expected_waiting = gradient(model, bfloat16=bfloat16)
    assert torch.equal(logps, expected_logps)
    assert len(grads) == len(expected_grads) > 0
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert waiting < expected_waiting
    if variant == "plain":
        assert waiting == 0


def test_nothing_stays_behind(tiny_policy_dir):
    """Neither after the pass nor where it fails."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    mlps = [layer.mlp for layer in model.model.layers]
    with recomputed_gates(model):
        assert all("forward" in vars(mlp) for mlp in mlps)
    with pytest.raises(ZeroDivisionError), recomputed_gates(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(mlp) for mlp in mlps)


def test_other_forms_are_left_alone(tiny_policy_dir):
    """A step more in between, a forward pass of its own, gradient checkpointing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    first, second = (layer.mlp for layer in model.model.layers)

    class Sparse(type(first)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(nn.functional.threshold(self.act_fn(self.gate_proj(x)), 0.1, 0.0) * self.up_proj(x))

    first.__class__ = Sparse
    second.forward = second.forward
    with recomputed_gates(model):
        assert "forward" not in vars(first)
        assert vars(second)["forward"].__self__ is second
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
    fused = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    with recomputed_gates(fused):
        assert not any("forward" in vars(module) for module in fused.modules())
    whole = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    whole.gradient_checkpointing_enable()
    with recomputed_gates(whole):
        assert not any("forward" in vars(module) for module in whole.modules())

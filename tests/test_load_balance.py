"""The load-balancing loss of mixtures of experts: over shared prefixes what transformers computes of padded rows."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import DogeConfig, GraniteMoeConfig, MixtralConfig, PhimoeConfig, Qwen3MoeConfig

from rlme.cli import app
from rlme.load_balance import RouterLogits
from rlme.scoring import completion_logps
from tests.test_architectures import COMPLETIONS, HEADS, PROMPTS, SIZE, SPECIAL, build, gradients, save
from tests.test_training import train
from tests.tiny_runs import read_metrics, write_config

EXPERTS = {"num_experts_per_tok": 2}
RUN = {**SIZE, **HEADS, **SPECIAL, "max_position_embeddings": 256}
MODELS = {
    "mixtral": MixtralConfig(**SIZE, **HEADS, **SPECIAL, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZE, **HEADS, **SPECIAL, **EXPERTS, num_experts=4, moe_intermediate_size=16),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_on_padded_rows(name, share):
    model = build(MODELS[name])
    routers = RouterLogits()
    logps, _ = completion_logps(model, PROMPTS, COMPLETIONS, share=share, routers=routers)
    found = routers.loss(top_k=2)
    rows = [torch.tensor(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    expected = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(found, expected)
    there, here = gradients(model, expected), gradients(model, found)
    assert any(grad.norm() > 1e-3 for grad in there.values())
    for parameter, grad in there.items():
        torch.testing.assert_close(here[parameter], grad, atol=1e-5, rtol=1e-4)

    in_passes = RouterLogits()
    with torch.no_grad():
        completion_logps(model, PROMPTS, COMPLETIONS, share=share, token_budget=40, routers=in_passes)
        again, _ = completion_logps(model, PROMPTS, COMPLETIONS, share=share)
    torch.testing.assert_close(in_passes.loss(top_k=2), expected)
    torch.testing.assert_close(again, logps)


def test_a_run_whose_configuration_names_its_experts_otherwise(tiny_policy_dir, tmp_path):
    """(TRL's own loss reads `num_experts`.) The batch goes through in several passes."""
    config = GraniteMoeConfig(
        **RUN, **EXPERTS, num_local_experts=4, router_aux_loss_coef=0.01, output_router_logits=True
    )
    model = save(config, tiny_policy_dir, tmp_path / "model", build)
    for budget in (8192, 64):
        folder = tmp_path / str(budget)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*correct, but slower")
            train(str(write_config(folder, model, train={"token_budget": budget})))
    whole, passes = (read_metrics(tmp_path / str(budget) / "run")[0] for budget in (8192, 64))
    assert 2 <= whole["aux_loss"] < 2.5  # 2 experts for a token, evenly used: 2
    # Only the balance is another with several passes: a mean of theirs.
    assert passes["aux_loss"] == pytest.approx(whole["aux_loss"], abs=0.1)
    losses = [line["loss"] - 0.01 * line["aux_loss"] for line in (whole, passes)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_model_that_tells_no_router_logits_says_so_once(tiny_policy_dir, tmp_path):
    model = save(DogeConfig(**RUN), tiny_policy_dir, tmp_path / "model", build)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(str(write_config(tmp_path, model)))
    assert sum("router logits cannot be had" in str(w.message) for w in caught) == 1
    assert all("aux_loss" not in line for line in read_metrics(tmp_path / "run"))


def test_adapters_leave_routers_alone(tiny_policy_dir, tmp_path):
    """Phi's are linear layers, and what they return is not their product."""
    config = PhimoeConfig(**RUN, **EXPERTS, num_local_experts=4)
    model = save(config, tiny_policy_dir, tmp_path / "model", build)
    train(str(write_config(tmp_path, model, lora={"r": 2})))
    names = load_file(tmp_path / "run" / "final-adapter" / "adapter_model.safetensors").keys()
    assert any("q_proj" in name for name in names)
    assert not any("router" in name for name in names)


def test_a_mixture_resumes_with_the_experts_it_had(tiny_policy_dir, tmp_path):
    """Each expert is saved by itself, under a name that the model in memory does not have."""
    config = Qwen3MoeConfig(**RUN, **EXPERTS, num_experts=4, moe_intermediate_size=16)
    model = save(config, tiny_policy_dir, tmp_path / "model", build)
    weights = []
    for name, steps in (("whole", 2), ("half", 1)):
        folder = tmp_path / name
        folder.mkdir()
        train(str(write_config(folder, model, train={"steps": steps, "checkpoint_every": 1})))
        if name == "half":
            app(["train", "--resume", str(folder / "run"), "--set", "train.steps=2"], standalone_mode=False)
        weights.append(load_file(folder / "run/final/model.safetensors"))
    whole, half = weights
    assert any(".experts." in key for key in whole)
    assert all(half[key].equal(value) for key, value in whole.items())

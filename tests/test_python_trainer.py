"""`RLMETrainer` from Python: settings of TRL's that files do not have, epochs, adapters, what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import GRPOConfig

from rlme import InputError, Judging, MetaReward, RLMETrainer, load_model, load_tokenizer
from rlme.scoring import continuation_logprobs
from rlme.tree_attention import tree_unsupported_reason

WAY = Judging("reply", "yes_no")


def trainer_of(
    policy: Path,
    folder: Path,
    prompts: int,
    *,
    model: Any = None,
    judges: Any = ("live",),
    budget: int | None = None,
    **settings: Any,
) -> Any:
    rows = [{"prompt": f"What is {i} plus {i}?"} for i in range(prompts)]
    arguments = GRPOConfig(
        str(folder), num_generations=2, per_device_train_batch_size=4, max_completion_length=4, report_to="none",
        use_cpu=True, disable_tqdm=True, bf16=False, **settings,
    )  # fmt: skip
    return RLMETrainer(
        load_model(policy) if model is None else model,
        MetaReward("Is it short?", list(judges), judging=WAY),
        token_budget=budget,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(policy),
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_go_on_where_the_ones_before_ended(tiny_policy_dir: Path, tmp_path: Path, shuffle: bool) -> None:
    trainer = trainer_of(tiny_policy_dir, tmp_path, 7, num_train_epochs=7, shuffle_dataset=shuffle)
    seen: list[str] = []
    trainer.on_rollouts = lambda step, rows: seen.extend(row["prompt"] for row in rows[::2])
    trainer.train()
    assert trainer.state.global_step == 21 and len(seen) == 42
    assert {seen.count(prompt) for prompt in seen} == {6}  # 7 x 3 batches of 2: six passes over 7 prompts
    in_order = [f"What is {i} plus {i}?" for i in range(7)]
    assert (seen[:7] == in_order) is not shuffle and set(seen[:7]) == set(in_order)


def test_parts_of_a_measurement_and_turns_are_drawn_apart(tiny_policy_dir: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_policy_dir, tmp_path, 4, max_steps=1)
    trainer.model.train()
    first, second = trainer._sampling_seed(), trainer._sampling_seed()
    trainer.model.eval()
    held_out = [trainer._sampling_seed() for _ in range(2)]
    assert len({first, second, *held_out}) == 4
    trainer.model.train()
    assert trainer._sampling_seed() == first  # of a resumed run as well


def test_checkpointing_keeps_its_settings_and_leaves_no_hooks(tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tiny_policy_dir, tmp_path, 4, max_steps=4, save_strategy="no", **options)
    hooks: list[int] = []
    trainer.on_rollouts = lambda step, rows: hooks.append(len(trainer.model.get_input_embeddings()._forward_hooks))
    trainer.train()
    assert hooks[-1] - hooks[0] <= 3  # TRL's own, one a batch
    layer = next(m for m in trainer.model.modules() if hasattr(m, "_gradient_checkpointing_func"))
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}


def test_passes_are_smaller_on_a_cpu_unless_told(tiny_policy_dir: Path, tmp_path: Path) -> None:
    assert trainer_of(tiny_policy_dir, tmp_path, 4, max_steps=1).token_budget == 1024
    assert trainer_of(tiny_policy_dir, tmp_path, 4, max_steps=1, budget=64).token_budget == 64


def test_what_cannot_be_is_refused(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch_compile is true"):
        trainer_of(tiny_policy_dir, tmp_path, 4, max_steps=1, torch_compile=True)
    adapted = get_peft_model(load_model(tiny_policy_dir), LoraConfig(r=2, init_lora_weights=False))
    trainer = trainer_of(tiny_policy_dir, tmp_path, 4, model=adapted, judges=["frozen"], max_steps=1)
    with pytest.raises(InputError, match="merge it first"):
        trainer.train()


def test_a_kernels_attention_is_left_alone(tiny_policy_dir: Path) -> None:
    model = load_model(tiny_policy_dir)
    expected, _ = continuation_logprobs(model, [[5, 6, 7]], [[[8]]])
    model = load_model(tiny_policy_dir)
    model.config._attn_implementation_internal = "flash_attention_2"  # as where its package is
    assert "flash_attention_2" in (tree_unsupported_reason(model) or "")
    assert expected[0][0] < 0


def test_a_reference_that_follows_the_policy_is_resumed(tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {
        "beta": 0.5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
    }
    ends = []
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for until in steps:
            trainer = trainer_of(tiny_policy_dir, tmp_path / name, 8, max_steps=until, **options)
            trainer.train(resume_from_checkpoint=until != steps[0])
        ends.append(load_file(tmp_path / name / "checkpoint-4" / "model.safetensors"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

"""Rewards, advantages and the loss's gradient against an independent, slow implementation of RLME eqs. 3, 5, 7, 8.

The naive side reads only what a run writes down (prompt and completion text, sampled ids) and computes every number
again: one completion at a time, full logits, float32, no sharing, no padding.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig

from rlme import Judging, MetaReward, Question, RLMETrainer

G, PROMPTS, CLIP, TEMPERATURE = 3, 4, 0.99, 0.9
TEXTS = [f"What is {a} plus {a + 1}?" for a in range(PROMPTS)]
SPELLINGS = {
    label: [s for w in (label, label.capitalize(), label.lower()) for s in (w, " " + w)] for label in ("YES", "NO")
}


def naive_logps(model: Any, context: list[int], continuation: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log p of each continuation token, from full logits of one sequence."""
    logits = model(torch.tensor([context + continuation])).logits[0].float() / temperature
    rows = logits[len(context) - 1 : len(context) + len(continuation) - 1].log_softmax(-1)
    return rows[torch.arange(len(continuation)), torch.tensor(continuation)]


def naive_score(model: Any, tokenizer: Any, row: dict[str, Any], question: Question, readout: str) -> float:
    """One question's score, written out from the definitions."""
    if readout == "marker":
        text = (
            f"{row['prompt']}{row['completion']}\n---------Evaluation---------\n"
            "Judge the solution above. Write øYESø or øNOø and nothing else. "
            "A solution whose answer cannot be found because of its form is wrong.\n"
            f"About the solution: it has {len(row['completion'])} characters.\n\n{question.ask}\nResponse: ø"
        )
        target = tokenizer(question.target + "ø", add_special_tokens=False)["input_ids"]
        return naive_logps(model, tokenizer(text)["input_ids"], target).sum().item()
    text = (
        f'Message: {row["prompt"]}\nReply: "{row["completion"].strip()}"\n\n'
        f"Question: {question.ask} (Yes or No)\nAnswer:"
    )
    context = tokenizer(text)["input_ids"]
    mass: dict[str, float] = {}
    for label, spellings in SPELLINGS.items():
        written = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in spellings]
        everything = [tokenizer(s, add_special_tokens=False)["input_ids"] for ss in SPELLINGS.values() for s in ss]
        shortest = [ids for ids in written if not any(o != ids and ids[: len(o)] == o for o in everything)]
        mass[label] = sum(math.exp(naive_logps(model, context, ids).sum().item()) for ids in shortest)
    return math.log(mass[question.target] / (mass["YES"] + mass["NO"]))


class Capture(TrainerCallback):
    """Weights before, batch, and gradient of every update."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().cpu().clone() for n, p in self.trainer.model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            {n: p.grad.cpu().clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        )


@pytest.mark.parametrize("readout", ["marker", "yes_no"])
@pytest.mark.parametrize(
    ("token_budget", "accumulate", "share"), [(8192, 1, True), (64, 1, True), (8192, 2, True), (8192, 1, False)]
)
def test_rewards_advantages_and_gradient_equal_the_equations(
    tiny_base_dir: Path, tmp_path: Path, readout: str, token_budget: int, accumulate: int, share: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    start = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    questions = [Question("Is the answer correct?", "correct", 1.0), Question("Is it long?", "long", -0.3, target="NO")]
    weights = [0.75, 0.25]
    template = "paper" if readout == "marker" else "reply"
    reward = MetaReward(
        questions,
        ["live", "frozen"],
        evaluator_weights=weights,
        judging=Judging(template=template, readout=readout),
        token_budget=token_budget,
        share_prefixes=share,
    )
    capture, batches = Capture(), []
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=PROMPTS * G // accumulate,
        gradient_accumulation_steps=accumulate,
        num_generations=G,
        num_iterations=2,  # the second update meets ratios other than 1
        max_completion_length=7,
        temperature=TEMPERATURE,
        learning_rate=5e-3,
        max_grad_norm=0.0,
        loss_type="cispo",
        epsilon_high=CLIP,
        importance_sampling_level="sequence",
        scale_rewards="none",
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    trainer = RLMETrainer(
        AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32),
        reward,
        token_budget=token_budget,
        share_prefixes=share,
        on_rollouts=lambda step, rows: batches.append((step, [dict(r) for r in rows])),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": TEXTS, "prompt_index": list(range(PROMPTS))}),
        processing_class=tokenizer,
        callbacks=[capture],
    )
    capture.trainer = trainer
    ids: list[list[int]] = []
    generate = trainer._generate_single_turn

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        ids.extend(result[0])
        return result

    trainer._generate_single_turn = keep  # type: ignore[method-assign]
    trainer.train()

    assert [step for step, _ in batches] == [1]  # one batch, two updates on it
    rows = batches[0][1]

    # eq. 3: r = sum_j v_j sum_k w_k log p_jk; at step 0 the live and the frozen self are the same weights
    for row in rows:
        expected = sum(
            v * q.weight * naive_score(start, tokenizer, row, q, readout) for v in weights for q in questions
        )
        assert row["reward"] == pytest.approx(expected, abs=2e-4)

    # eq. 5: A = r - mean of the group, no division by std
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    assert len(groups) == PROMPTS and all(len(g) == G for g in groups.values())
    for group in groups.values():
        mean = sum(r["reward"] for r in group) / G
        for row in group:
            assert row["advantage"] == pytest.approx(row["reward"] - mean, abs=1e-5)

    # eqs. 7 and 8 (as TRL runs them: ratio of the mean token log-probs, clamped from above; loss over active tokens)
    total = sum(map(len, ids))
    for update in range(2):
        policy = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
        policy.load_state_dict(capture.weights[update], strict=False)
        clipped = 0
        for row, completion in zip(rows, ids, strict=True):
            prompt = tokenizer(row["prompt"])["input_ids"]
            logps = naive_logps(policy, prompt, completion, TEMPERATURE)
            with torch.no_grad():
                old = naive_logps(start, prompt, completion, TEMPERATURE)
                ratio = float((logps.detach() - old).mean().exp())
            clipped += ratio > CLIP
            loss = -min(ratio, CLIP) * row["advantage"] * logps.sum() / total
            loss.backward()
        if update == 1:
            assert clipped, "no ratio was clipped: the test would not see a wrong bound"
        for name, gradient in capture.gradients[update].items():
            expected_gradient = dict(policy.named_parameters())[name].grad
            assert expected_gradient is not None
            difference = (gradient - expected_gradient).norm() / expected_gradient.norm().clamp(min=1e-8)
            assert difference < 2e-4, f"{name} at update {update}: relative difference {difference:.2e}"

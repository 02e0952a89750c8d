"""Sides of a comparison, one after another: some training steps of each, and what each stage took.

    python benchmarks/side.py --side ours|off|peer ... --workload w1 --steps 2

`ours` is RLME's trainer; `off` the same with sharing off; `peer` is TRL's GRPOTrainer with the reward function that a
careful user would write, `peer:N` with N rows in a training pass instead of TRL's default of 8. All have the same
model, prompts, questions, loss, optimizer and precision: float32 weights; bfloat16 autocast and evaluators in bfloat16
where the machine multiplies bfloat16 in hardware, else float32 throughout (there PyTorch's bfloat16 is several times
slower); no gradient checkpointing. Prints one line of JSON for each side.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workloads import GPU, QUESTIONS, UNCOUNTED, WORKLOADS, Workload

from rlme.evaluators.local import LocalEvaluator
from rlme.judging import Judging
from rlme.models import BUILTIN, fast_bfloat16, load_model, load_tokenizer
from rlme.questions import MARKER, PAPER, READOUTS
from rlme.reward import MetaReward
from rlme.templating import render
from rlme.training.trainer import RLMETrainer

STAGES = ("sample", "judge", "update")
BF16 = fast_bfloat16()
PRECISION: Literal["bfloat16", "float32"] = "bfloat16" if BF16 else "float32"  # of frozen copies' weights, too
# Tokens of one pass on our side. A GPU wants the default; a CPU the workload's own in training. Judging holds no
# activations: from 4096 on, what a group shares is rarely computed twice.
GPU_BUDGET = 8192
JUDGE_BUDGET = GPU_BUDGET if GPU else 4096
# Rows that TRL's side judges at a time. No activations are held: 8 to 16 are the fastest on two cores.
PEER_JUDGE_ROWS = 96 if GPU else 8
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    # Batched products are attention's alone in these models; softmax is, but for drawing a token.
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "aten::_efficient_attention",
    ),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::fill_", "aten::zero_"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "aten::lerp_", "aten::addcdiv_", "aten::addcmul_"),
}


class Stages(TrainerCallback):
    """Seconds and forwarded positions of each stage; the update is what sampling and judging leave of a step."""

    def __init__(self, clock: Any, profiled: str | None) -> None:
        self.clock = clock
        self.profiled = profiled
        self.profiler: Any = None
        self.shares: dict[str, float] = {}
        self.stage = "update"
        self.seconds: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.steps: list[dict[str, Any]] = []

    def around(self, stage: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self.stage = self.stage, stage
            self.profile(stage)
            started = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += self.clock() - started
                self.stage = before
                self.profile("update" if stage == "judge" else None)

        return timed

    def profile(self, stage: str | None) -> None:
        """Start the profiler where the profiled stage begins, stop it where another does."""
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            times: Counter[str] = Counter()
            for event in self.profiler.key_averages():
                kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "everything else")
                times[kind] += event.self_device_time_total or event.self_cpu_time_total
            self.shares = {kind: time / times.total() for kind, time in times.most_common()}
            self.profiler = None
        if stage is not None and stage == self.profiled:
            # The profiler takes its memory from between the tensors'. What they then lack would be new pages, each a
            # fault that counts as arithmetic (a tenth of an update): 2 GiB of touched and freed ones serve instead.
            spare = [torch.ones(2**26) for _ in range(0 if GPU else 8)]
            del spare
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()

    def count(self, model: torch.nn.Module) -> None:
        """Count the positions that enter a model: padding and repeated tokens included."""
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: self.tokens.update({self.stage: args[0].numel()})
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.clear()
        self.tokens.clear()
        self.started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = self.clock() - self.started
        self.profile(None)
        seconds = {stage: self.seconds[stage] for stage in ("sample", "judge")}
        seconds |= {"update": total - sum(seconds.values()), "step": total}
        self.steps.append({"seconds": seconds, "tokens": dict(self.tokens)})


def arguments(workload: Workload, folder: str, *, steps: int, micro_batch: int) -> GRPOConfig:
    rows = workload.prompts * workload.group
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=workload.group,
        max_completion_length=workload.completion_tokens,
        loss_type="cispo",
        epsilon_high=5.0,
        beta=0.0,
        learning_rate=2e-6,
        bf16=BF16,
        use_cpu=not GPU,
        gradient_checkpointing=False,
        scale_rewards="none",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def peer_reward(models: list[Any], tokenizer: Any, questions: list[str], batch_size: int) -> Any:
    """Mean log-probability of `YES` and the marker after each question: batched, logits of two positions."""
    target = tokenizer("YES" + MARKER, add_special_tokens=False)["input_ids"]

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            context = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            text = completion[-1]["content"]
            variables = {"context": context, "completion": text, "n_chars": len(text), "answer": None, "anchor": None}
            variables |= {"previous": [], "reply_format": READOUTS["marker"].reply_format}
            for question in questions:
                texts.append(render(PAPER.text, variables | {"question": question}, where="peer") + " " + MARKER)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + target[:-1] for text in texts]
        scores = [0.0] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for model in models:
            autocast = BF16 and model.dtype == torch.float32  # the policy judging itself
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, padding_side="left", return_tensors="pt")
                with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                    logits = model(**batch.to(model.device), logits_to_keep=len(target), use_cache=False).logits
                wanted = torch.tensor(target, device=logits.device).expand(len(rows), -1)
                logps = logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0].sum(-1)
                for i, value in zip(rows, logps.tolist(), strict=True):
                    scores[i] += value
        k = len(questions)
        return [sum(scores[i * k : (i + 1) * k]) for i in range(len(prompts))]

    return reward


def build(side: str, workload: Workload, model_name: str, folder: str, steps: int, stages: Stages) -> Any:
    tokenizer = load_tokenizer(model_name)
    policy = load_model(model_name)
    copies = 0 if workload.live else workload.evaluators
    evaluators = [load_model(model_name, dtype=PRECISION) for _ in range(copies)]
    questions = list(QUESTIONS[: workload.questions])
    dataset = Dataset.from_list([{"prompt": messages} for messages in workload.messages(tokenizer)])
    for model in (policy, *evaluators):
        stages.count(model)
    common: dict[str, Any] = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": [stages]}
    trainer: Any
    rows = workload.prompts * workload.group
    side, _, peer_rows = side.partition(":")
    if side == "peer":
        batch = min(int(peer_rows or 8), rows)
        reward = peer_reward(evaluators or [policy], tokenizer, questions, batch_size=PEER_JUDGE_ROWS)
        trainer = GRPOTrainer(
            policy,
            reward_funcs=[reward],
            args=arguments(workload, folder, steps=steps, micro_batch=batch),
            **common,
        )
    else:
        share = side == "ours"
        judges: list[Any] = [
            LocalEvaluator(model, tokenizer, name=f"frozen{i}", chat=False, share=share, token_budget=JUDGE_BUDGET)
            for i, model in enumerate(evaluators)
        ]
        trainer = RLMETrainer(
            policy,
            MetaReward(
                questions,
                judges or ["live"],
                judging=Judging("paper", "marker"),
                token_budget=JUDGE_BUDGET,
                share_prefixes=share,
            ),
            share_prefixes=share,
            token_budget=GPU_BUDGET if GPU else workload.token_budget,
            args=arguments(workload, folder, steps=steps, micro_batch=rows if share else min(8, rows)),
            **common,
        )
    trainer._generate_single_turn = stages.around("sample", trainer._generate_single_turn)
    trainer._calculate_rewards = stages.around("judge", trainer._calculate_rewards)
    return trainer


def wall() -> float:
    """Seconds, once what a GPU was given is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: torch.device, clock: Any) -> float:
    """GFLOP/s of a product of the size of a transformer layer's, in the precision of the comparison."""
    dtype = getattr(torch, PRECISION)
    rows, width = (8192, 4096) if GPU else (2048, 1024)  # enough to fill it
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        started = clock()
        for _ in range(10):
            product = a @ b
        float(product[0, 0])
        best = max(best, 10 * 2 * rows * width * width / (clock() - started) / 1e9)
    return best


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train with one side, and what it took."""
    clock = wall if options.clock == "wall" else time.process_time
    if GPU:
        gc.collect()  # the side before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stages = Stages(clock, options.profile)
    with tempfile.TemporaryDirectory() as folder:
        workload, steps = WORKLOADS[options.workload], options.steps + UNCOUNTED
        if options.token_budget:
            workload = replace(workload, token_budget=options.token_budget)
        trainer = build(side, workload, options.model, folder, steps, stages)
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    head = model.get_output_embeddings().weight.numel()
    return {
        "side": side,
        "workload": options.workload,
        "steps": stages.steps[UNCOUNTED:],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0,
        "gpu": torch.cuda.get_device_name() if GPU else None,
        "body_weights": model.num_parameters() - head,
        "precision": PRECISION,
        "matmul_gflops": matmul_rate(model.device, clock),
        "threads": torch.get_num_threads(),
        "profile": stages.shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", required=True, metavar="SIDE", help="ours, off, peer or peer:ROWS")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--steps", type=int, default=2, help=f"measured steps; {UNCOUNTED} more run before them")
    parser.add_argument("--token-budget", type=int, help="of our training passes on a CPU, instead of the workload's")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--profile", choices=STAGES, help="report where this stage's time goes; slows it down")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for side in options.side:
        print(json.dumps(measure(side, options)), flush=True)


if __name__ == "__main__":
    main()

"""The training loop: TRL's `GRPOTrainer` with our sampling, our loss computation and one reward.

    prompts --sample--> completions --judge--> judgements --> rewards --(TRL)--> advantages --update--> policy

TRL keeps the loop, the distribution, the optimiser and every loss formula. Three of its methods are replaced, each by
an equal but cheaper computation over shared prefixes: `_generate_single_turn`, `_get_per_token_logps_and_entropies`,
and `training_step` (one backward pass per pack of whole groups instead of per fixed number of rows). Beside them, the
order of the prompts is ours (`rlme.training.order`), and groups stay together in micro-batches.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from accelerate.utils.memory import clear_device_cache
from torch.nn.functional import pad
from trl import GRPOTrainer

from rlme.checkpoints import KeepsRollouts
from rlme.errors import InputError
from rlme.evaluators.self_evaluator import unwrapped
from rlme.forward import length_kind
from rlme.key_values import HeldPrefix, KeyValues
from rlme.load_balance import RouterLogits, prepare_mixture
from rlme.memory import keep_freed_memory, prefer_huge_pages
from rlme.models import slow_bfloat16
from rlme.reward import MetaReward, Row
from rlme.sampling import Sampled, length_to_stop, sample
from rlme.scoring import completion_logps, read_prefix
from rlme.training.order import PromptOrder
from rlme.training.packs import (
    Pack,
    apart,
    as_many_as_others,
    dealt_in_groups,
    merge_metrics,
    plan,
    rows_of,
    share_of_batch,
    with_prefixes,
)
from rlme.tree_attention import check_adapter


class RLMETrainer(KeepsRollouts, GRPOTrainer):
    """GRPO with a reward made of questions (RLME sec. 3; eqs. 3, 5, 7, 8).

    Args:
        reward: a `MetaReward`, or a `PairwiseReward`; it is TRL's only reward function.
        share_prefixes: compute the prompt of a group once in sampling and loss. Models that cannot are served by the
            plain path, with a warning that names the reason.
        token_budget: tokens in one forward-backward pass; whole groups are kept together where they fit. None: 8192,
            on a CPU 1024.
        on_stage: called with the name of each stage (sample, judge, update) as it begins.
        checkpoint_done: called with a checkpoint's folder when everything is in it.
        on_rollouts: called with (step, rows) as soon as a batch is judged; `step` is the first update that uses it.
        stop_strings: a completion ends after any of these.
        Everything else as in `trl.GRPOTrainer`.
    """

    _tag_names = ["rlme", "trl", "grpo"]  # noqa: RUF012 - TRL's class attribute

    def __init__(
        self,
        model: Any,
        reward: MetaReward,
        *,
        share_prefixes: bool = True,
        token_budget: int | None = None,
        stop_strings: list[str] | None = None,
        on_rollouts: Callable[[int, list[Row]], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        checkpoint_done: Callable[[Path], None] | None = None,
        **trl_arguments: Any,
    ) -> None:
        if not hasattr(reward, "score"):
            raise InputError(f"reward is a {type(reward).__name__}, expected one MetaReward or PairwiseReward")
        self.reward = reward
        self.share_prefixes = share_prefixes
        self.stop_strings = stop_strings or []
        self.on_rollouts = on_rollouts
        self.on_stage = on_stage
        self.checkpoint_done = checkpoint_done
        self.timings: dict[str, float] = {}
        """Seconds of each stage since the last update's metrics were written: sample, judge, update."""
        self.counts: dict[str, int] = {}
        """Tokens of each stage since then: sampled, judged (computed), judged_in (asked about), trained."""
        self.key_values: KeyValues | None = None
        """What sampling computed, for live evaluators; there between sampling and judging only."""
        self.upcoming: list[dict[str, Any]] | None = None
        """Rows of the data set whose completions are sampled next and judged then: judging of each may begin early."""
        self._truncated: list[bool] = []
        self._current_train_step_time: float
        self._buffered_inputs: Any
        self._sampled_logps: list[list[float]] | None = None
        self._routers: RouterLogits | None = None
        self._held: HeldPrefix | None = None  # what a pass and others begin with
        self._gives_back = False  # it is the last of them
        self._drawn, self._draws = ("", -1), 0  # what was sampled for last, and how often before
        super().__init__(model, reward_funcs=[reward], **trl_arguments)
        # A CPU is busy with 1,024 tokens: what larger passes hold is memory for nothing.
        self.token_budget = token_budget or (1024 if self.accelerator.device.type == "cpu" else 8192)
        if self.args.torch_compile and share_prefixes:
            raise InputError("torch_compile is true: compiled models cannot share prefixes (train.share_prefixes)")
        check_adapter(self.model)
        if self.ref_model is not None and not self._sharded:
            # TRL reads it again from where the policy once came from; it is the policy as it is now.
            weights = self.accelerator.unwrap_model(self.model).state_dict()
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(weights)
        # The loss that keeps a model's experts evenly used: TRL's own needs whole rows, all in one pass.
        self.aux_loss_enabled: bool
        self._balance = self.router_aux_loss_coef if self.aux_loss_enabled and share_prefixes else 0.0
        self.aux_loss_enabled = self.aux_loss_enabled and not share_prefixes
        # TRL would take completions that a stop string has ended for truncated ones.
        self._mask_truncated = self.mask_truncated_completions
        self.mask_truncated_completions: bool = False
        prepare_mixture(self.model)
        if self.args.bf16 and slow_bfloat16(self.accelerator.device):
            warnings.warn(
                "bfloat16 takes this CPU several times as long as float32: pass bf16=False to the GRPOConfig, whose "
                "default is True (in a configuration file, train.precision: auto)",
                stacklevel=2,
            )
        keep_freed_memory(self.accelerator.device)
        prefer_huge_pages(self.accelerator.device)

    # -- data order -------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return PromptOrder(
            prompts=len(dataset if dataset is not None else self.train_dataset),
            prompts_per_batch=self.args.generation_batch_size // self.num_generations,
            group_size=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
            batches=self._generation_batches(),
            seed=self.args.seed,
            shuffle=bool(self.shuffle_dataset),
        )

    def _generation_batches(self) -> int:
        if self.args.max_steps <= 0:  # epochs: Transformers comes back for each
            return max(1, len(self.train_dataset) * self.num_generations // self.args.generation_batch_size)
        micro_steps = self.args.max_steps * self.args.gradient_accumulation_steps
        per_generation = self.num_iterations * self.args.steps_per_generation
        return -(-micro_steps // per_generation)

    # -- sample -----------------------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        with self._timed("sample"):
            # Fully sharded weights are gathered in each forward pass, so all processes have to take as many.
            theirs = self.use_vllm or self.use_transformers_continuous_batching or self.is_fsdp_enabled
            theirs = theirs or (self._deepspeed and not self.args.ds3_gather_for_generation)
            # Any of transformers' processors, and caches of its own.
            theirs = theirs or bool(self.args.generation_kwargs) or self.args.cache_implementation is not None
            if not self.share_prefixes or theirs or images:
                completion_ids, logprobs = super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
                completion_ids, logprobs = self._stopped(completion_ids, logprobs)
            else:
                completion_ids, logprobs = self._sample(prompt_ids)
        self._count("sampled", sum(map(len, completion_ids)))
        return completion_ids, logprobs

    def _stopped(self, completion_ids: list[list[int]], logprobs: Any) -> tuple[list[list[int]], Any]:
        """Completions that others have sampled, cut after a stop string."""
        stops = [length_to_stop(ids, self.stop_strings, self._tokenizer) for ids in completion_ids]
        cut = [ids[:stop] for ids, stop in zip(completion_ids, stops, strict=True)]
        self._truncated = [stop is None and self._cut_off(ids) for ids, stop in zip(cut, stops, strict=True)]
        if logprobs is not None:
            logprobs = [values[: len(ids)] for values, ids in zip(logprobs, cut, strict=True)]
        return cut, logprobs

    def _cut_off(self, ids: list[int]) -> bool:
        """Whether a completion does not end with a token that ends one."""
        return not ids or ids[-1] not in {*self.eos_token_ids, self._tokenizer.pad_token_id}

    def _sample(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], None]:
        learning, seed = self.model.training, self._sampling_seed()
        prompts: list[list[int]] = []
        counts: list[int] = []
        for ids in prompt_ids:  # a group's copies of its prompt follow one another
            if prompts and ids == prompts[-1]:
                counts[-1] += 1
            else:
                prompts.append(ids)
                counts.append(1)
        evaluators = self._evaluators()
        live = any(getattr(evaluator, "known", None) is not None for evaluator in evaluators)
        self.key_values = KeyValues() if live and not self.is_fsdp_enabled else None
        with (
            unwrapped(self) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            training = model.training  # sampling wants no dropout
            model.eval()
            groups = sample(
                model,
                prompts,
                counts,
                max_new_tokens=self.max_completion_length,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k or 0,
                min_p=self.min_p or 0.0,
                repetition_penalty=self.repetition_penalty,
                eos_token_ids=self.eos_token_ids,
                stop_strings=self.stop_strings,
                tokenizer=self._tokenizer,
                seed=seed,
                dtype=torch.bfloat16 if self.args.bf16 else None,
                on_finished=self._on_finished(counts),
                keep=self.key_values,
            )
            model.train(training)
        drawn = [one for group in groups for one in group]
        self._truncated = [not one.finished for one in drawn]
        # Under the plain distribution the sampled log-probs are the policy's own: where TRL asks for them first (only
        # when a batch serves several updates), it need not recompute them.
        asked = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0
        plain = self.top_p == 1 and not self.top_k and not self.min_p and self.repetition_penalty == 1
        # A cache is read with positions as they were embedded when it was written.
        kind = length_kind(self.model)
        whole = kind is None or not any(
            kind(len(ids) + len(one.ids)) for ids, group in zip(prompts, groups, strict=True) for one in group
        )
        usable = asked and plain and learning and whole and not self.tools  # these let a completion take several turns
        self._sampled_logps = [one.logprobs for one in drawn] if usable else None
        return [one.ids for one in drawn], None

    def _on_finished(self, counts: list[int]) -> Callable[[int, int, Sampled], None] | None:
        """What starts the judging of a completion while others are still written, if any evaluator can."""
        rows = self.upcoming
        able = hasattr(self.reward, "begin") and any(hasattr(e, "begin") for e in self._evaluators())
        parsed = any(getattr(self._tokenizer, name, None) for name in ("response_template", "response_schema"))
        if rows is None or not able or parsed:  # TRL reads parsed replies in its own way, all at once
            return None
        first = [sum(counts[:p]) for p in range(len(counts))]

        def begin(p: int, c: int, one: Sampled) -> None:
            text = self._tokenizer.decode(one.ids, skip_special_tokens=True)
            self.reward.begin(rows[first[p] + c], text, one.ids, trainer=self)

        return begin

    def _sampling_seed(self) -> int:
        """A function of run seed, batch and process alone, so that a resumed run draws the same completions."""
        at = ("train", self._step) if self.model.training else ("eval", self.state.global_step)
        self._draws = self._draws + 1 if self._drawn == at else 0  # another turn, or part of a measurement
        self._drawn = at
        again = f"-{self._draws}" if self._draws else ""
        key = f"{self.args.seed}-{at[0]}-{at[1]}-{self.accelerator.process_index}{again}"
        return random.Random(key).getrandbits(63)

    def _evaluators(self) -> list[Any]:
        return self.reward.evaluators(self) if self.reward.questions else []

    def _generate(self, prompts: Any) -> Any:
        self._truncated = []
        result = super()._generate(prompts)
        if len(self._truncated) != len(result[1]):  # tools or a rollout function: not one turn for each
            self._truncated = [self._cut_off(ids) for ids in result[1]]
        return result

    # -- judge ------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        evaluators = self._evaluators()
        before = sum(getattr(e, "tokens_computed", 0) for e in evaluators)
        with self._timed("judge"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.key_values = None  # the next update makes them stale
        self._count("judged", sum(getattr(e, "tokens_computed", 0) for e in evaluators) - before)
        self._count("judged_in", sum(j["tokens_in"] for row in self.reward.rows for j in row["judgements"]))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._sampled_logps, self.upcoming = None, inputs
        batch = super()._generate_and_score_completions(inputs)
        self.upcoming = None
        rows = self.reward.rows
        for i, (row, example) in enumerate(zip(rows, inputs, strict=True)):
            row["prompt_index"] = int(example.get("prompt_index", -1))
            row["group"] = (self.accelerator.process_index * len(rows) + i) // self.num_generations
            row["sample"] = (self.accelerator.process_index * len(rows) + i) % self.num_generations
            row["truncated"] = self._truncated[i]
            row["advantage"] = None if row["reward"] is None else batch["advantages"][i].item()
        # TRL gives a missing reward advantage 0; its tokens must not count in the loss's normaliser either.
        left_out = [row["reward"] is None or (self._mask_truncated and row["truncated"]) for row in rows]
        if any(left_out):
            counts = ~torch.tensor(left_out, device=self.accelerator.device)
            batch["completion_mask"] = batch["completion_mask"] * counts.unsqueeze(1)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        if self.model.training and self.on_rollouts is not None:
            self.on_rollouts(self.state.global_step + 1, gather_object(rows))
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, which deals the rows of a new batch to micro-batches at random; here groups stay together, where all
        micro-batches add up to one update."""
        n = self.args.steps_per_generation
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        parts = self._buffered_inputs
        images = any(isinstance(value, list) for value in inputs.values())
        if parts is before or images or not self.share_prefixes or not 1 < n <= self.args.gradient_accumulation_steps:
            return inputs
        self._buffered_inputs = dealt_in_groups(parts)
        return self._buffered_inputs[self._step % n]

    # -- update -----------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **fields: Any,
    ) -> Any:
        multimodal = any(value is not None for value in fields.values())
        if self._sampled_logps is not None and not torch.is_grad_enabled() and model is self.model:
            # the policy has not moved since it sampled: these are its log-probs (TRL asks for them first)
            sampled, self._sampled_logps = self._sampled_logps, None
            padded = input_ids.new_zeros((len(sampled), logits_to_keep), dtype=torch.float32)
            for i, values in enumerate(sampled):
                padded[i, : len(values)] = torch.tensor(values)
            return padded, None, None
        if not self.share_prefixes or multimodal:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **fields,
            )
        self._routers = RouterLogits() if self._balance and torch.is_grad_enabled() else None
        split = input_ids.shape[1] - logits_to_keep
        mask = attention_mask.bool()
        with self.accelerator.autocast():
            logps, entropies = completion_logps(
                model,
                [ids[m] for ids, m in zip(input_ids[:, :split], mask[:, :split], strict=True)],
                [ids[m] for ids, m in zip(input_ids[:, split:], mask[:, split:], strict=True)],
                temperature=self.temperature,
                compute_entropy=compute_entropy,
                token_budget=None if torch.is_grad_enabled() else self.pass_budget,
                routers=self._routers,
                float32_head=self.args.cast_lm_head_to_fp32,
                held=self._held if torch.is_grad_enabled() else None,
                gives_back=self._gives_back,
            )
        rest = (0, logits_to_keep - logps.shape[1])  # TRL's columns: the longest completion of the whole batch
        return pad(logps, rest), pad(entropies, rest) if entropies is not None else None, None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Sample and judge when a new batch is due, then one backward pass per pack of groups."""
        started = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have two modes as well
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self._timed("update"):
            packs = self._packs(model, inputs)
            total = torch.zeros((), device=self.accelerator.device)
            counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            tokens, sizes = [int(counted[pack.rows].sum()) for pack in packs], [len(pack.rows) for pack in packs]
            batch_rows, batch_tokens = sum(sizes), max(1, sum(tokens))
            first = {key: len(values) for key, values in self._metrics["train"].items()}
            several = len(packs) > 1 and self.accelerator.num_processes > 1
            for i, (pack, held) in enumerate(with_prefixes(packs, partial(self._read_prefix, model))):
                self._held, self._gives_back = held, pack.last
                with (
                    nullcontext() if i == len(packs) - 1 else self.accelerator.no_sync(model),
                    apart(self.accelerator) if several else nullcontext(),
                ):
                    part = inputs if len(packs) == 1 else rows_of(inputs, pack.rows)
                    shares = {"rows": sizes[i] / batch_rows, "tokens": tokens[i] / batch_tokens}
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, part) * share_of_batch(self.loss_type, **shares)
                        loss = loss + self._balance_loss() * shares["tokens"]
                    extra: dict[str, Any] = {"scale_wrt_gas": False} if self._deepspeed else {}
                    if self.args.optim in ("lomo", "adalomo"):  # which update in the backward pass
                        extra["learning_rate"] = self._get_learning_rate()
                    self.accelerator.backward(loss, **extra)
                total += loss.detach()
                del loss  # and the weights that its graph has cast, before the next pass
            self._held = held = None
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
            if len(packs) > 1:
                merge_metrics(
                    self._metrics["train"],
                    first,
                    tokens=tokens,
                    rows=sizes,
                    by_row=self.importance_sampling_level == "sequence",
                    accelerator=self.accelerator,
                )
        self._count("trained", sum(tokens))
        self._step += 1
        self._current_train_step_time += time.perf_counter() - started
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return total

    def _balance_loss(self) -> torch.Tensor | float:
        """What the experts of the last pass add to its loss, weighted and logged as TRL does."""
        if self._routers is None:
            return 0.0
        value = self._routers.loss(self.model.config.get_text_config().num_experts_per_tok)
        self._routers = None
        if value is None:
            self._balance = 0.0
            warnings.warn(
                "the model's router logits cannot be had: it is trained without the loss that keeps its experts "
                "evenly used",
                stacklevel=2,
            )
            return 0.0
        gathered = self.accelerator.gather_for_metrics(value.detach())
        self._metrics["train"]["aux_loss"].append(gathered.mean().item())
        return self._balance * value / self.current_gradient_accumulation_steps

    @property
    def _deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    @property
    def _sharded(self) -> bool:
        """Whether weights may be gathered in each forward pass: all processes then have to take as many."""
        return self._deepspeed or bool(self.is_fsdp_enabled)

    @property
    def pass_budget(self) -> int | None:
        """Tokens of a pass without gradient; None where processes have to take as many passes."""
        return None if self._sharded else self.token_budget

    def _packs(self, model: Any, inputs: Any) -> list[Pack]:
        """Rows of each forward-backward pass. One pass where the batch cannot be split exactly: DeepSpeed counts
        backward passes itself, TRL's entropy bonus is a mean over a pass, its choice of uncertain tokens one in it."""
        n = len(inputs["completion_ids"])
        entropies = self._entropy_bonus_enabled or self.top_entropy_quantile < 1
        if self._deepspeed or entropies or not self.share_prefixes:
            return [Pack(list(range(n)))]
        prompts = [ids[m.bool()] for ids, m in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
        answers = [ids[m.bool()] for ids, m in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)]
        # Sharded weights are waited for in each forward pass, and routers are heard where the prompt is read.
        hold = not self._sharded and not self._balance
        with self.accelerator.autocast():
            packs = plan(model, prompts, answers, self.token_budget, hold=hold)
        return as_many_as_others(packs, self.accelerator) if self.accelerator.num_processes > 1 else packs

    def _read_prefix(self, model: Any, prefix: torch.Tensor) -> HeldPrefix:
        with self.accelerator.autocast():
            return read_prefix(model, prefix)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        if self.on_stage is not None:
            self.on_stage(stage)
        started = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":  # whose work is only queued
            torch.cuda.synchronize(self.accelerator.device)
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started

    def _count(self, what: str, n: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + n

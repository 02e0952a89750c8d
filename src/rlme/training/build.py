"""From the configuration to prompts, questions, evaluators and the reward."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, cast

from rlme.align.judge import PairwiseJudge
from rlme.align.prompts import reference_texts
from rlme.align.protocols import load_protocol
from rlme.align.reward import PairwiseReward
from rlme.config import Config, EvaluatorConfig, PairwiseRewardConfig
from rlme.data import PromptSet, build_prompts, load_rows
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import STYLES, build_evaluator, make_judging, make_questions, named_evaluator
from rlme.reward import MetaReward, anchored_rows


def load_prompts(config: Config, tokenizer: Any) -> tuple[PromptSet, PromptSet | None]:
    """Training prompts and (where given) held-out ones."""
    data = config.data
    sets: list[PromptSet | None] = []
    for key, source, split, limit in (
        ("train", data.train, data.split, data.limit),
        ("eval", data.eval, data.eval_split, data.eval_limit),
    ):
        if source is None:
            sets.append(None)
            continue
        try:
            rows = load_rows(source, split=split, name=data.name, limit=limit)
        except InputError as error:
            raise InputError(f"data.{key}: {error}") from None
        sets.append(
            build_prompts(
                rows,
                prompt=data.prompt,
                system=data.system,
                answer=data.answer,
                answer_from=data.answer_format,
                tokenizer=tokenizer,
                chat=data.chat,
                max_prompt_tokens=data.max_prompt_tokens,
            )
        )
    train, held_out = sets
    assert train is not None
    if held_out is not None:
        learned = {json.dumps(prompt.prompt) for prompt in train.prompts}
        held_out.report.trained_on = [p.row for p in held_out.prompts if json.dumps(p.prompt) in learned]
    return train, held_out


def make_evaluator(
    spec: EvaluatorConfig, config: Config, *, spent: Mapping[str, Mapping[str, float]] | None = None
) -> Evaluator:
    """An evaluator that needs no trainer: another model, an endpoint, or (without an adapter) the frozen self. `spent`:
    what a run that goes on has taken so far, all processes together."""
    if spec.model == "frozen":
        # Without an adapter to switch off, the frozen self is a copy, loaded from where the policy came from: a
        # resumed run must not freeze the weights it resumes with.
        own = {"model": config.model.path, "revision": config.model.revision, "name": spec.label}
        spec = spec.model_copy(update={**own, "trust_remote_code": config.model.trust_remote_code})
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    before = {name: account.get("cost", 0.0) / processes for name, account in (spent or {}).items()}
    return build_evaluator(share_of(spec), cache=config.judging, spent=before, **judge_options(config))


def share_of(spec: EvaluatorConfig) -> EvaluatorConfig:
    """The part of an endpoint's limits that each of the run's processes may use."""
    processes, endpoint = int(os.environ.get("WORLD_SIZE", "1")), spec.endpoint
    if endpoint is None or processes == 1:
        return spec
    limits = {name: getattr(endpoint, name) for name in ("requests_per_minute", "tokens_per_minute", "max_cost")}
    limits = {name: value / processes for name, value in limits.items() if value is not None}
    limits["concurrency"] = max(1, endpoint.concurrency // processes)
    return spec.model_copy(update={"endpoint": endpoint.model_copy(update=limits)})


def judge_options(config: Config) -> dict[str, Any]:
    """What every evaluator in this process is given."""
    return {
        "token_budget": _judging_budget(config),
        "share": config.train.share_prefixes,
        "max_context_tokens": config.judging.max_context_tokens,
    }


def _judging_budget(config: Config) -> int:
    """Tokens of a pass without gradient, which holds little of them."""
    return config.train.token_budget or 8192


def make_reward(config: Config, evaluators: list[str | Evaluator]) -> MetaReward:
    """The file's reward."""
    gold: dict[str, Any] = {
        "answer": "gold" if config.data.answer else None,
        "completion_format": config.data.completion_format,
        "compare": config.data.compare,
    }
    if config.reward.mode == "pairwise":
        pairs = config.reward.pairwise or PairwiseRewardConfig()
        reward = PairwiseReward(
            evaluators=evaluators,
            weights=config.evaluator_weights(),
            seed=config.train.seed,
            max_failure_rate=config.reward.max_failure_rate,
            evaluator_options=judge_options(config),
            **gold,
            **pairs.model_dump(),
        )
        return cast(MetaReward, reward)  # has all of it that training asks for
    return MetaReward(
        make_questions(config.questions),
        evaluators,
        evaluator_weights=config.evaluator_weights() if evaluators else None,  # nobody is asked nothing
        judging=make_judging(config.judging),
        mode=config.reward.mode,
        combine=config.reward.combine,
        rlvr_weight=config.reward.rlvr_weight,
        rlme_weight=config.reward.rlme_weight,
        **gold,
        max_failure_rate=config.reward.max_failure_rate,
        token_budget=_judging_budget(config),
        share_prefixes=config.train.share_prefixes,
        max_context_tokens=config.judging.max_context_tokens,
    )


def training_dataset(prompts: PromptSet, config: Config) -> Any:
    """The prompts as TRL wants them, with the anchored ones marked."""
    dataset = prompts.to_dataset()
    if config.data.answer is None:
        dataset = dataset.remove_columns("gold")
    if config.reward.anchor > 0:
        dataset = dataset.add_column(
            "anchored", anchored_rows(len(dataset), config.reward.anchor, seed=config.train.seed)
        )
    return dataset


def check_pairwise(config: Config, prompts: PromptSet) -> None:
    """Refuse at the start an unknown protocol, and a prompt without the reference that the protocol shows.

    Raises:
        InputError: naming the column, and the row where a reference is missing or empty.
    """
    pairs = config.reward.pairwise or PairwiseRewardConfig()
    protocol, column = load_protocol(pairs.protocol), pairs.reference
    if not protocol.needs_reference:
        return
    if column not in prompts.prompts[0].columns:
        raise InputError(
            f"{config.data.train}: protocol {protocol.name!r} shows the judge a reference, but there is no column "
            f"{column!r} (reward.pairwise.reference); its columns are {', '.join(prompts.prompts[0].columns)}"
        )
    for prompt in prompts.prompts:
        if not reference_texts(prompt.columns.get(column)):
            raise InputError(
                f"{config.data.train}, row {prompt.row}: the reference (column {column!r}) is missing or empty"
            )


def check_pairwise_judge(evaluator: Evaluator, config: Config) -> None:
    """Refuse at the start an evaluator that cannot tell the protocol's labels apart."""
    pairs = config.reward.pairwise or PairwiseRewardConfig()
    try:
        PairwiseJudge([evaluator], load_protocol(pairs.protocol))
    except ConnectionError as error:
        raise InputError(f"evaluator {evaluator.name!r}: {error}") from None


def adopt(reward: MetaReward, specs: list[EvaluatorConfig], trainer: Any) -> None:
    """Turn the names `live` and `frozen` into evaluators that borrow this trainer's policy."""
    chosen = reward._evaluators
    for i, spec in enumerate(specs):
        source = chosen[i]
        if isinstance(source, str):
            chosen[i] = named_evaluator(
                source,
                trainer,
                name=spec.label,
                chat=STYLES[spec.style],
                **reward._options,
            )

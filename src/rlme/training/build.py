"""From the configuration to prompts, questions, evaluators and the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlme.config import Config, EvaluatorConfig
from rlme.data import PromptSet, build_prompts, load_rows
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import STYLES, build_evaluator, make_judging, make_questions, named_evaluator
from rlme.evaluators.cache import CachedEvaluator, JudgeCache, model_identity
from rlme.reward import MetaReward, anchored_rows


def load_prompts(config: Config, tokenizer: Any) -> tuple[PromptSet, PromptSet | None]:
    """Training prompts and (where given) held-out ones."""
    data = config.data
    sets: list[PromptSet | None] = []
    for source, split, limit in (
        (data.train, data.split, data.limit),
        (data.eval, data.eval_split, data.eval_limit),
    ):
        if source is None:
            sets.append(None)
            continue
        rows = load_rows(source, split=split, name=data.name, limit=limit)
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
    return train, held_out


def make_evaluator(spec: EvaluatorConfig, config: Config) -> Evaluator:
    """An evaluator that needs no trainer: another model, an endpoint, or (without an adapter) the frozen self."""
    if spec.model == "frozen":
        # Without an adapter to switch off, the frozen self is a copy, loaded from where the policy came from: a
        # resumed run must not freeze the weights it resumes with.
        own = {"model": config.model.path, "revision": config.model.revision, "name": spec.label}
        spec = spec.model_copy(update={**own, "trust_remote_code": config.model.trust_remote_code})
    evaluator = build_evaluator(spec, **judge_options(config))
    if config.judging.cache is None:
        return evaluator
    cache = JudgeCache(Path(config.judging.cache), max_bytes=config.judging.cache_mb * 2**20)
    identity = getattr(evaluator, "identity", None) or model_identity(str(spec.model), spec.revision)
    return CachedEvaluator(evaluator, cache, identity=f"{identity} {spec.dtype}")


def judge_options(config: Config) -> dict[str, Any]:
    """What every evaluator in this process is given."""
    return {
        "token_budget": config.train.token_budget,
        "share": config.train.share_prefixes,
        "max_context_tokens": config.judging.max_context_tokens,
    }


def make_reward(config: Config, evaluators: list[str | Evaluator]) -> MetaReward:
    """The file's reward."""
    return MetaReward(
        make_questions(config.questions),
        evaluators,
        evaluator_weights=config.evaluator_weights(),
        judging=make_judging(config.judging),
        mode=config.reward.mode,
        combine=config.reward.combine,
        rlvr_weight=config.reward.rlvr_weight,
        rlme_weight=config.reward.rlme_weight,
        answer="gold" if config.data.answer else None,
        completion_format=config.data.completion_format,
        compare=config.data.compare,
        max_failure_rate=config.reward.max_failure_rate,
        token_budget=config.train.token_budget,
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

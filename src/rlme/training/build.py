"""From the configuration to prompts, questions, evaluators and the reward."""

from __future__ import annotations

from typing import Any

from rlme.config import Config, EvaluatorConfig, TemplateConfig
from rlme.data import PromptSet, build_prompts, load_rows
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import model_evaluator, named_evaluator
from rlme.judging import Judging
from rlme.questions import Question, Template
from rlme.reward import MetaReward, anchored_rows

STYLES = {"auto": None, "chat": True, "completion": False}


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


def make_questions(config: Config) -> list[Question]:
    """The file's questions."""
    return [
        Question(q.ask, name, q.weight, q.target, _template(q.template), q.readout)
        for name, q in config.questions.items()
    ]


def make_judging(config: Config) -> Judging:
    """The file's judging section."""
    j = config.judging
    template = _template(j.template)
    assert template is not None
    return Judging(template, j.readout, j.joint, j.reason_tokens, j.reason_then)


def _template(value: str | TemplateConfig | None) -> str | Template | None:
    return Template(value.kind, value.text) if isinstance(value, TemplateConfig) else value


def make_evaluator(spec: EvaluatorConfig, config: Config) -> str | Evaluator:
    """One evaluator of the file; `live` and a LoRA run's `frozen` stay names until there is a trainer."""
    if spec.endpoint is not None:
        from rlme.evaluators.endpoint import EndpointEvaluator

        return EndpointEvaluator(spec.endpoint, name=spec.label)
    assert spec.model is not None
    source = spec.model
    loading: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if source == "frozen":
        # Without an adapter to switch off, the frozen self is a copy, loaded from where the policy came from: a
        # resumed run must not freeze the weights it resumes with.
        source = config.model.path
        loading = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    chat = STYLES[spec.style]
    return model_evaluator(
        source,
        name=spec.label,
        dtype=spec.dtype,
        load_in_4bit=spec.load_in_4bit,
        chat=chat,
        token_budget=config.train.token_budget,
        share=config.train.share_prefixes,
        max_context_tokens=config.judging.max_context_tokens,
        **loading,
    )


def make_reward(config: Config, evaluators: list[str | Evaluator]) -> MetaReward:
    """The file's reward."""
    return MetaReward(
        make_questions(config),
        evaluators,
        evaluator_weights=config.evaluator_weights(),
        judging=make_judging(config),
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

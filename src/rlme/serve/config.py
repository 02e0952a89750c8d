"""What `rlme serve` reads of a configuration file: the file of a training run can be served as it is."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from rlme.config import (
    EvaluatorConfig,
    JudgingConfig,
    QuestionConfig,
    RewardConfig,
    Section,
    TemplateConfig,
    evaluator_list,
    named_questions,
    short_for,
)
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import Message, Request
from rlme.judging import Judging
from rlme.questions import Question, Template
from rlme.reward import MetaReward


class ServeConfig(Section):
    """The judging half of a run's configuration. The keys of the training half may be there and are not used."""

    questions: Annotated[dict[str, QuestionConfig], BeforeValidator(named_questions)]
    """name: question text, or name: {ask, weight, target, template, readout}."""
    evaluators: Annotated[list[EvaluatorConfig], BeforeValidator(evaluator_list)]
    """A model | {model, weight, name, dtype, ...} | {endpoint: {...}}. There is no policy here, so no `live`."""
    judging: JudgingConfig = JudgingConfig()
    """Template and read-out of the questions."""
    reward: Annotated[RewardConfig, short_for("mode")] = RewardConfig()
    """Reward mode; rlvr parts use the `answer` that comes with a completion."""
    data: Any = None
    """`answer`, `completion_format` and `compare` as in a run's file: with `data.answer`, items may bring a known
    answer. The other keys are not used here."""
    model: Any = None
    train: Any = None
    lora: Any = None
    output: Any = None
    trl: Any = None

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if not self.questions or not self.evaluators:
            raise ValueError("a reward server needs `questions` and `evaluators`")
        if own := next((e.model for e in self.evaluators if e.model in ("live", "frozen")), None):
            raise ValueError(f"evaluator {own!r} is the policy of a training run; name a model or an endpoint to serve")
        answers = isinstance(self.data, dict) and self.data.get("answer")
        if self.reward.mode != "rlme" and not answers:
            raise ValueError(f"reward.mode {self.reward.mode} needs known answers: set data.answer")
        if self.reward.mode == "rlvr+rlme" and self.reward.combine == "normalized":
            raise ValueError(
                "reward.combine: normalized depends on which completions stand in one batch; serve `combine: sum`"
            )
        return self

    def weights(self) -> list[float]:
        """v_j of equation 3; evaluators without a weight share 1 equally."""
        open_ = sum(e.weight is None for e in self.evaluators)
        return [1 / open_ if e.weight is None else e.weight for e in self.evaluators]


def make_evaluators(config: ServeConfig) -> list[Evaluator]:
    """Load the models and probe the endpoints."""
    return [_evaluator(spec, config) for spec in config.evaluators]


def _evaluator(spec: EvaluatorConfig, config: ServeConfig) -> Evaluator:
    chat = {"auto": None, "chat": True, "completion": False}[spec.style]
    if spec.endpoint is not None:
        from rlme.evaluators.endpoint import EndpointEvaluator

        return EndpointEvaluator(
            spec.endpoint, name=spec.label, chat=chat, max_context_tokens=config.judging.max_context_tokens
        )
    from rlme.evaluators.build import model_evaluator

    assert spec.model is not None
    return model_evaluator(
        spec.model,
        name=spec.label,
        dtype=spec.dtype,
        revision=spec.revision,
        load_in_4bit=spec.load_in_4bit,
        trust_remote_code=spec.trust_remote_code,
        chat=chat,
        max_context_tokens=config.judging.max_context_tokens,
    )


def make_reward(config: ServeConfig, evaluators: list[Evaluator]) -> MetaReward:
    """The reward of the file. One `MetaReward` belongs to one thread; evaluators may be shared."""
    j = config.judging
    data = config.data if isinstance(config.data, dict) else {}
    judging = Judging(_template(j.template) or "auto", j.readout, j.joint, j.reason_tokens, j.reason_then)
    return MetaReward(
        [
            Question(q.ask, name, q.weight, q.target, _template(q.template), q.readout)
            for name, q in config.questions.items()
        ],
        evaluators,
        evaluator_weights=config.weights(),
        judging=judging,
        mode=config.reward.mode,
        combine=config.reward.combine,
        rlvr_weight=config.reward.rlvr_weight,
        rlme_weight=config.reward.rlme_weight,
        answer="gold" if data.get("answer") else None,
        completion_format=data.get("completion_format"),
        compare=data.get("compare", "math"),
    )


def check_labels(config: ServeConfig, evaluators: list[Evaluator]) -> None:
    """Refuse at the start what an evaluator cannot answer. `InputError` with the alternative."""
    from rlme.evaluators.endpoint import EndpointEvaluator
    from rlme.judging import plan_questions

    reward = make_reward(config, evaluators)
    for evaluator in evaluators:
        try:
            plans = plan_questions(evaluator, reward.questions, reward.judging)
        except ConnectionError as error:
            raise InputError(f"evaluator {evaluator.name!r}: {error}") from None
        if isinstance(evaluator, EndpointEvaluator):
            turn: Message = {"role": "user", "content": ""}
            for plan in plans:
                prefill = "" if plan.reason else plan.readout.prefill
                evaluator.check([Request("" if plan.template.kind == "text" else (turn,), plan.continuations, prefill)])


def _template(value: str | TemplateConfig | None) -> str | Template | None:
    return Template(value.kind, value.text) if isinstance(value, TemplateConfig) else value

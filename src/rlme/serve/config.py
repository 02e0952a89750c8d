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
    evaluator_weights,
    named_questions,
    short_for,
)
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import build_evaluators, check_evaluator, make_judging, make_questions
from rlme.reward import MetaReward
from rlme.templating import undeclared
from rlme.verify import check_method


class ServeConfig(Section):
    """The judging half of a run's configuration. The keys of the training half may be there and are not used."""

    questions: Annotated[dict[str, QuestionConfig], BeforeValidator(named_questions)]
    """name: question text, or name: {ask, weight, target, labels, template, readout}."""
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
        if self.reward.mode == "pairwise":
            raise ValueError("reward.mode pairwise compares a whole group, and a server is asked about one completion")
        templates = [self.judging.template, *(q.template for q in self.questions.values())]
        texts = [t.text if isinstance(t, TemplateConfig) else t for t in templates if t is not None]
        if any("n_tokens" in undeclared(text) for text in (*texts, *(q.ask for q in self.questions.values()))):
            raise ValueError("a question or template uses n_tokens, and a server is told no tokens: use n_chars")
        data = self.data if isinstance(self.data, dict) else {}
        if data.get("compare", "math") not in ("math", "exact"):
            raise ValueError(f"data.compare is {data['compare']!r}, expected math or exact")
        if data.get("completion_format") is not None:
            check_method(data["completion_format"])
        answers = data.get("answer")
        if "rlvr" in self.reward.mode and not answers:
            raise ValueError(f"reward.mode {self.reward.mode} needs known answers: set data.answer")
        if self.reward.mode == "rlvr+rlme" and self.reward.combine == "normalized":
            raise ValueError(
                "reward.combine: normalized depends on which completions stand in one batch; serve `combine: sum`"
            )
        return self

    def weights(self) -> list[float]:
        """v_j of equation 3, in the order of `evaluators`."""
        return evaluator_weights(self.evaluators)


def make_evaluators(config: ServeConfig) -> list[Evaluator]:
    """Load the models and probe the endpoints; `judging.cache` keeps their answers."""
    longest = config.judging.max_context_tokens
    return build_evaluators(config.evaluators, cache=config.judging, max_context_tokens=longest)


def make_reward(config: ServeConfig, evaluators: list[Evaluator]) -> MetaReward:
    """The reward of the file. One `MetaReward` belongs to one thread; evaluators may be shared."""
    data = config.data if isinstance(config.data, dict) else {}
    return MetaReward(
        make_questions(config.questions),
        evaluators,
        evaluator_weights=config.weights(),
        judging=make_judging(config.judging),
        mode=config.reward.mode,  # type: ignore[arg-type]  # never pairwise: refused above
        combine=config.reward.combine,
        rlvr_weight=config.reward.rlvr_weight,
        rlme_weight=config.reward.rlme_weight,
        answer="gold" if data.get("answer") else None,
        completion_format=data.get("completion_format"),
        compare=data.get("compare", "math"),
    )


def check_labels(config: ServeConfig, evaluators: list[Evaluator]) -> None:
    """Refuse at the start what an evaluator cannot answer. `InputError` with the alternative."""
    for evaluator in evaluators:
        check_evaluator(evaluator, make_questions(config.questions), make_judging(config.judging))

"""From the configuration to judges: a model in this process, an endpoint, or the policy itself; and their questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlme.config import EvaluatorConfig, JudgingConfig, QuestionConfig, TemplateConfig
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judging import Judging
from rlme.questions import Question, Template

Self = Callable[[str], Evaluator]
"""Gives the policy as an evaluator: `live`, or `frozen` as it was before the first preference update."""


def build_evaluators(
    configs: Sequence[EvaluatorConfig], policy: Self | None = None, **options: int | None
) -> list[Evaluator]:
    """One evaluator per entry, in order, under the names that tables show.

    `options`: `max_context_tokens`, the longest context any of them is given (None: its own limit), and `token_budget`
    of those in this process.

    Raises:
        InputError: two entries of one name; `live` or `frozen` where there is no policy; a model that cannot be had.
    """
    names = [config.label for config in configs]
    if duplicate := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"two judges are called {duplicate!r}: give one of them another `name`.")
    return [_build(config, policy, options) for config in configs]


def _build(config: EvaluatorConfig, policy: Self | None, options: dict[str, int | None]) -> Evaluator:
    chat = {"auto": None, "chat": True, "completion": False}[config.style]
    if config.endpoint is not None:
        from rlme.evaluators.endpoint import EndpointEvaluator

        longest = options.get("max_context_tokens")
        return EndpointEvaluator(config.endpoint, name=config.label, chat=chat, max_context_tokens=longest)
    assert config.model is not None
    if config.model in ("live", "frozen"):
        if policy is None:
            raise InputError(f"judge {config.model!r} is a policy in training; name a model or an endpoint here.")
        return policy(config.model)
    from rlme.evaluators.build import model_evaluator

    return model_evaluator(
        config.model,
        name=config.label,
        dtype=config.dtype,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=config.load_in_4bit,
        chat=chat,
        **options,
    )


def make_questions(questions: Mapping[str, QuestionConfig]) -> list[Question]:
    """The file's questions."""
    return [
        Question(q.ask, name, q.weight, q.target, _template(q.template), q.readout) for name, q in questions.items()
    ]


def make_judging(config: JudgingConfig) -> Judging:
    """The file's judging section."""
    template = _template(config.template)
    assert template is not None
    return Judging(template, config.readout, config.joint, config.reason_tokens, config.reason_then)


def _template(value: str | TemplateConfig | None) -> str | Template | None:
    return Template(value.kind, value.text) if isinstance(value, TemplateConfig) else value

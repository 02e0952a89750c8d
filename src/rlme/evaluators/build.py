"""From the configuration to evaluators and questions: the policy itself, another model, an endpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlme.config import EvaluatorConfig, JudgingConfig, QuestionConfig, TemplateConfig
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import Message, Request
from rlme.judging import Judging, plan_questions
from rlme.questions import Question, Template

STYLES = {"auto": None, "chat": True, "completion": False}
"""`style` of an evaluator -> asked through a chat template? None: when it has one."""

Self = Callable[[EvaluatorConfig], Evaluator]
"""Gives the policy as an evaluator, `live` or `frozen`, where there is a policy."""


def build_evaluators(
    specs: Sequence[EvaluatorConfig], policy: Self | None = None, *, cache: JudgingConfig | None = None, **options: Any
) -> list[Evaluator]:
    """One evaluator per entry, in order, under the names that tables show.

    `cache`: where answers are kept, if it says so; never those of the policy, whose weights change. `options`:
    `max_context_tokens`, the longest context any of them is given (None: its own limit), and `token_budget` and `share`
    of those in this process; `spent`, by name, what counts for `max_cost` already.

    Raises:
        InputError: two entries of one name; `live` or `frozen` where there is no policy; a model that cannot be had.
    """
    names = [spec.label for spec in specs]
    if duplicate := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"two evaluators are called {duplicate!r}: give one of them another `name`")
    return [build_evaluator(spec, policy, cache=cache, **options) for spec in specs]


def build_evaluator(
    spec: EvaluatorConfig, policy: Self | None = None, *, cache: JudgingConfig | None = None, **options: Any
) -> Evaluator:
    """The evaluator of one entry of the file."""
    if spec.model in ("live", "frozen"):
        if policy is None:
            raise InputError(f"evaluator {spec.model!r} is a policy in training; name a model or an endpoint here")
        return policy(spec)
    evaluator = _fixed_evaluator(spec, **options)
    if cache is None or cache.cache is None:
        return evaluator
    from rlme.evaluators.cache import CachedEvaluator, JudgeCache, model_identity

    file = JudgeCache(Path(cache.cache), max_bytes=cache.cache_mb * 2**20)
    identity = getattr(evaluator, "identity", None) or model_identity(str(spec.model), spec.revision)
    precision = "4bit" if spec.load_in_4bit else spec.dtype
    return CachedEvaluator(evaluator, file, identity=f"{identity} {precision}")


def _fixed_evaluator(spec: EvaluatorConfig, **options: Any) -> Evaluator:
    chat = STYLES[spec.style]
    spent: Mapping[str, float] = options.pop("spent", {})
    if spec.endpoint is not None:
        from rlme.evaluators.endpoint import EndpointEvaluator

        longest, before = options.get("max_context_tokens"), spent.get(spec.label, 0.0)
        return EndpointEvaluator(
            spec.endpoint, name=spec.label, chat=chat, max_context_tokens=longest, spent_before=before
        )
    assert spec.model is not None
    return model_evaluator(
        spec.model,
        name=spec.label,
        dtype=spec.dtype,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        load_in_4bit=spec.load_in_4bit,
        chat=chat,
        **options,
    )


def check_evaluator(evaluator: Evaluator, questions: Sequence[Question], judging: Judging) -> None:
    """Refuse at the start what the evaluator cannot answer.

    Raises:
        InputError: a label that its tokenizer cannot write, a chat template without chat, a server that does not give
            the log-probabilities of a read-out; each with the alternative.
    """
    try:
        plans = plan_questions(evaluator, questions, judging)
    except ConnectionError as error:
        raise InputError(f"evaluator {evaluator.name!r}: {error}") from None
    check: Any = getattr(evaluator, "check", None)  # a server's: one real call
    if check is None:
        return
    for plan in plans:
        turn: Message = {"role": "user", "content": ""}
        prefill = "" if plan.reason else plan.readout.prefill
        check([Request("" if plan.template.kind == "text" else (turn,), plan.continuations, prefill)])


def make_questions(questions: Mapping[str, QuestionConfig]) -> list[Question]:
    """The file's questions."""
    return [
        Question(q.ask, name, q.weight, q.target, _template(q.template), q.readout, tuple(q.labels))
        for name, q in questions.items()
    ]


def make_judging(config: JudgingConfig) -> Judging:
    """The file's judging section."""
    template = _template(config.template)
    assert template is not None
    return Judging(template, config.readout, config.joint, config.reason_tokens, config.reason_then)


def _template(value: str | TemplateConfig | None) -> str | Template | None:
    return Template(value.kind, value.text) if isinstance(value, TemplateConfig) else value


def named_evaluator(source: str, trainer: Any = None, *, name: str | None = None, **options: Any) -> Evaluator:
    """`live` or `frozen` (the policy of `trainer`), or the model at `source` (hub id, folder, .gguf, builtin:NAME).

    `options` go to `LocalEvaluator`.
    """
    from rlme.evaluators.local import LocalEvaluator
    from rlme.evaluators.self_evaluator import frozen_adapter_evaluator, live_evaluator

    if source in ("live", "frozen") and trainer is None:
        raise InputError(f"evaluator {source!r} is the policy itself and needs a trainer; name a model instead")
    if source == "live":
        return live_evaluator(trainer, name=name or "live", **options)
    if source == "frozen":
        if hasattr(trainer.model, "disable_adapter"):
            second = (p for n, p in trainer.model.named_parameters() if ".lora_B." in n or ".lora_embedding_B." in n)
            if trainer.state.global_step == 0 and any(bool(p.any()) for p in second):
                raise InputError(
                    "evaluator 'frozen': the policy's adapter changes the model from the start, so without it this is "
                    "another model: merge it first (merge_and_unload) and train a new one, or name a model"
                )
            return frozen_adapter_evaluator(trainer, name=name or "frozen", **options)
        name = name or "frozen"
        if trainer.state.global_step == 0 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).requires_grad_(False).eval()
            vars(model).pop("forward", None)  # accelerate's, around that of the policy
            return LocalEvaluator(model, trainer.processing_class, name=name, **options)
        source = trainer.model.config._name_or_path  # of a resumed run: where it began
    return model_evaluator(source, name=name, **options)


def model_evaluator(
    source: str,
    *,
    name: str | None = None,
    dtype: Literal["float32", "bfloat16", "auto"] = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    **options: Any,
) -> Evaluator:
    """Another model with its own tokenizer and chat template. dtype auto: bfloat16 on a GPU, float32 on a CPU."""
    from rlme.evaluators.local import LocalEvaluator
    from rlme.models import default_device, fast_bfloat16, load_model, load_tokenizer

    device = default_device()
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and fast_bfloat16() else "float32"
    loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_model(source, dtype=dtype, load_in_4bit=load_in_4bit, device=device, **loading)
    tokenizer = load_tokenizer(source, **loading)
    name = name or source.rstrip("/").removesuffix(".gguf").split("/")[-1].split(":")[-1]
    return LocalEvaluator(model, tokenizer, name=name, **options)

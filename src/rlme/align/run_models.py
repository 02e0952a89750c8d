"""The models of an alignment run: one policy in memory at a time, to sample from, to judge with, or to train."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlme.align.config import AlignConfig
from rlme.align.prompts import AlignPrompt, encode_prompt
from rlme.cast_weights import weights_in
from rlme.config import EvaluatorConfig
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import STYLES, build_evaluators
from rlme.evaluators.local import LocalEvaluator
from rlme.lora import lora_arguments
from rlme.models import (
    check_gradient_checkpointing,
    check_model,
    end_of_turn,
    end_tokens,
    fast_bfloat16,
    load_model,
    load_tokenizer,
)
from rlme.sampling import sample


class RunModels:
    """Policies are named by where they lie: the configured model, or a stage's folder."""

    def __init__(self, config: AlignConfig, tokenizer: Any, spent: Mapping[str, float]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._spent = spent  # on each endpoint so far
        self._loaded: tuple[str, Any] | None = None
        self._others: dict[str, list[Evaluator]] = {}

    def answers(
        self, source: str, prompts: Sequence[AlignPrompt], n: int, temperature: float, longest: int, seed: int
    ) -> list[tuple[list[str], list[bool]]]:
        """Per prompt: n texts, and which of them were cut off at `longest` tokens."""
        model = self._model(source)
        ends = {*end_tokens(model), self.tokenizer.eos_token_id} - {None}
        drawn = sample(
            model,
            [encode_prompt(self.tokenizer, p.prompt) for p in prompts],
            n,
            max_new_tokens=longest,
            temperature=temperature,
            top_p=self.config.sample.top_p if temperature > 0 else 1.0,
            eos_token_ids=sorted(ends),
            seed=seed,
            dtype=_arithmetic(),
        )
        return [
            (
                [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in group],
                [not one.finished for one in group],
            )
            for group in drawn
        ]

    def evaluators(self, configs: Sequence[EvaluatorConfig], live: str, frozen: str) -> list[Evaluator]:
        """The configured judges; `live` and `frozen` are the policies at those places."""
        judging = self.config.judge.judging
        options: dict[str, Any] = {"token_budget": self.config.token_budget}
        options["max_context_tokens"] = judging.max_context_tokens
        served: dict[str, Any] = {**options, "spent": self._spent}

        def policy(spec: EvaluatorConfig) -> Evaluator:
            model = self._model(live if spec.model == "live" else frozen)
            chat = STYLES[spec.style]
            return LocalEvaluator(lambda: _reading(model), self.tokenizer, name=spec.label, chat=chat, **options)

        if any(c.model in ("live", "frozen") for c in configs):
            return build_evaluators(configs, policy, cache=judging, **served)
        key = repr(configs)
        if key not in self._others:  # the same in every round
            self._others[key] = build_evaluators(configs, cache=judging, **served)
        return self._others[key]

    def endpoints(self, configs: Sequence[EvaluatorConfig]) -> list[Evaluator]:
        """Those of the configured judges that are asked over HTTP; refused here if their servers cannot judge."""
        served = [c for c in configs if c.endpoint is not None]
        return self.evaluators(served, "", "") if served else []

    def without_weights(self, configs: Sequence[EvaluatorConfig]) -> list[Evaluator]:
        """Stand-ins for the configured judges that are no endpoints: they have a tokenizer, but cannot judge."""
        found: list[Evaluator] = []
        for spec in configs:
            if spec.model is None:
                continue
            tokenizer = self.tokenizer
            if spec.model not in ("live", "frozen"):
                revision, trust = spec.revision, spec.trust_remote_code
                check_model(spec.model, revision, trust, load_in_4bit=spec.load_in_4bit)
                tokenizer = load_tokenizer(spec.model, revision=revision, trust_remote_code=trust)
            found.append(LocalEvaluator(None, tokenizer, name=spec.label, chat=STYLES[spec.style]))
        return found

    def trainable(self, source: str) -> Any:
        """A model of its own: training changes it, so it must not be handed out again afterwards."""
        self._loaded = None
        gc.collect()
        return self._load(source)

    def _model(self, source: str) -> Any:
        """The model at `source`, kept until another one is asked for."""
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None
            gc.collect()
            self._loaded = (source, self._load(source))
        return self._loaded[1]

    def _load(self, source: str) -> Any:
        model = self.config.model
        revision = model.revision if source == model.path else None
        loaded = load_model(source, dtype=model.dtype, revision=revision, trust_remote_code=model.trust_remote_code)
        if source == model.path:
            self._check_trainable(loaded)
        end, ends = end_of_turn(self.tokenizer), end_tokens(loaded)
        if end is not None and end not in ends and loaded.generation_config is not None:
            loaded.generation_config.eos_token_id = [*ends, end]  # a base model's own end is that of a text
        return loaded

    def _check_trainable(self, model: Any) -> None:
        """What cannot be trained as asked is said before hours of sampling and judging."""
        for name, stage in (("sft", self.config.sft), ("dpo", self.config.dpo)):
            if stage is not None and stage.gradient_checkpointing:
                check_gradient_checkpointing(model, f"{name}.gradient_checkpointing")
        lora_arguments(self.config.lora, model)


@contextmanager
def _reading(model: Any) -> Iterator[Any]:
    """Weights stay as training needs them (float32); judging computes like sampling."""
    with weights_in(model, _arithmetic()):
        yield model


def _arithmetic() -> torch.dtype | None:
    """bfloat16 where the hardware has it; None: as the weights are."""
    return torch.bfloat16 if fast_bfloat16() else None

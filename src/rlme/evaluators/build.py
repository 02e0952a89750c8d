"""From a name to an evaluator: live, frozen, or another model."""

from __future__ import annotations

from typing import Any, Literal

from rlme.errors import InputError
from rlme.evaluators.base import Evaluator


def named_evaluator(source: str, trainer: Any = None, *, name: str | None = None, **options: Any) -> Evaluator:
    """`live` or `frozen` (the policy of `trainer`), or the model at `source` (hub id, folder, .gguf, builtin:NAME).

    `options` go to `LocalEvaluator`.
    """
    from rlme.evaluators.self_evaluator import frozen_adapter_evaluator, live_evaluator

    if source in ("live", "frozen") and trainer is None:
        raise InputError(f"evaluator {source!r} is the policy itself and needs a trainer; name a model instead")
    if source == "live":
        return live_evaluator(trainer, name=name or "live", **options)
    if source == "frozen":
        if hasattr(trainer.model, "disable_adapter"):
            return frozen_adapter_evaluator(trainer, name=name or "frozen", **options)
        source, name = trainer.model.config._name_or_path, name or "frozen"
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
    from rlme.models import default_device, load_model, load_tokenizer

    device = default_device()
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_model(source, dtype=dtype, load_in_4bit=load_in_4bit, device=device, **loading)
    tokenizer = load_tokenizer(source, **loading)
    name = name or source.rstrip("/").removesuffix(".gguf").split("/")[-1].split(":")[-1]
    return LocalEvaluator(model, tokenizer, name=name, **options)

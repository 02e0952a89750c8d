"""rlme: train language models by reinforcement learning from questions in plain language.

Public names are imported on first use, so that `import rlme` is cheap and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlme.config import Config
    from rlme.errors import InputError, RunStopped
    from rlme.evaluators.base import Evaluator
    from rlme.evaluators.local import LocalEvaluator
    from rlme.judgement import Answer, Failure, Judgement, Request
    from rlme.judging import Judging, Sample, judge
    from rlme.models import load_model, load_tokenizer
    from rlme.questions import Question, Template
    from rlme.reward import MetaReward, anchored_rows
    from rlme.training.trainer import RLMETrainer

__version__ = "0.1.0"

_HOME = {
    "Answer": "rlme.judgement",
    "Config": "rlme.config",
    "Evaluator": "rlme.evaluators.base",
    "Failure": "rlme.judgement",
    "InputError": "rlme.errors",
    "Judgement": "rlme.judgement",
    "Judging": "rlme.judging",
    "LocalEvaluator": "rlme.evaluators.local",
    "MetaReward": "rlme.reward",
    "Question": "rlme.questions",
    "RLMETrainer": "rlme.training.trainer",
    "Request": "rlme.judgement",
    "RunStopped": "rlme.errors",
    "Sample": "rlme.judging",
    "Template": "rlme.questions",
    "anchored_rows": "rlme.reward",
    "judge": "rlme.judging",
    "load_model": "rlme.models",
    "load_tokenizer": "rlme.models",
}

__all__ = [
    "Answer",
    "Config",
    "Evaluator",
    "Failure",
    "InputError",
    "Judgement",
    "Judging",
    "LocalEvaluator",
    "MetaReward",
    "Question",
    "RLMETrainer",
    "Request",
    "RunStopped",
    "Sample",
    "Template",
    "__version__",
    "anchored_rows",
    "judge",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlme' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

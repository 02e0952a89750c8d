"""Evaluators: models that give log-probabilities of continuations of a context."""

from rlme.evaluators.base import Evaluator

__all__ = ["Evaluator"]

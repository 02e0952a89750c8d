"""Reward functions of one's own beside the questions: a form that is checked by rule, a length, a verifier's score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from rlme.errors import InputError

RewardFunction = Callable[..., Sequence[float | None]]
"""As TRL takes them: called with `prompts`, `completions`, `completion_ids` and the data's columns by name, each a
list; returns a number for each completion, or None where it has none."""
Weighted = dict[str, tuple[RewardFunction, float]]


def weighted_functions(functions: Mapping[str, RewardFunction | tuple[RewardFunction, float]]) -> Weighted:
    """name -> (function, weight), the weight 1 where none was given. Raises `InputError`."""
    found: Weighted = {}
    for name, given in functions.items():
        function, weight = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
        if not callable(function):
            raise InputError(f"function {name!r} is {given!r}, expected a function or (function, weight)")
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise InputError(f"function {name!r}: weight is {weight!r}, expected a number")
        found[name] = function, float(weight)
    return found


def call_functions(functions: Weighted, count: int, **given: Any) -> list[dict[str, float | None]]:
    """Each completion's numbers by function. What is not finite is None: missing, never a number."""
    rows: list[dict[str, float | None]] = [{} for _ in range(count)]
    for name, (function, _) in functions.items():
        returned = function(**given)
        if not hasattr(returned, "__iter__") or isinstance(returned, str | Mapping):
            raise InputError(
                f"function {name!r} returned {returned!r:.80}, expected a number or None for each completion"
            )
        values = list(returned)
        if len(values) != count:
            raise InputError(f"function {name!r} returned {len(values)} values for {count} completions")
        for row, value in zip(rows, values, strict=True):
            row[name] = _finite(name, value)
    return rows


def _finite(name: str, value: Any) -> float | None:
    try:
        number = math.nan if value is None else float(value + 0)  # a text is no number, whatever it spells
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"function {name!r} returned {value!r:.80} for a completion, expected a number or None"
        ) from None
    return number if math.isfinite(number) else None


def add_functions(reward: float | None, values: Mapping[str, float | None], functions: Weighted) -> float | None:
    """reward + sum of weight * value; None when a part that counts is missing."""
    parts = [(weight, values[name]) for name, (_, weight) in functions.items() if weight != 0]
    if reward is None or any(value is None for _, value in parts):
        return None
    return reward + math.fsum(weight * value for weight, value in parts if value is not None)

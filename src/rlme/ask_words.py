"""What the numbers of `rlme ask` mean, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlme.candidates import Candidate

if TYPE_CHECKING:
    from rlme.ask import Asked, Verdict

SPREAD, MASS, SHIFT, SCORE_SHIFT, FAILED = 0.05, 0.5, 0.05, 0.1, 0.05
"""Below these a question has no signal: spread of the score within a group (nats, or points of the scale), mean label
mass, mean change of p(target) and of the score when answers are exchanged; above the last, too many judgements fail."""


def complaints(verdict: Verdict) -> list[str]:
    """Why a question has no signal, in words; empty when it has."""
    said = []
    failed = sum(verdict.failures.values())
    if failed > FAILED * verdict.completions:
        kinds = ", ".join(sorted(verdict.failures))
        said.append(f"{failed} of {verdict.completions} judgements failed ({kinds})")
    if math.isnan(verdict.spread.value):
        said.append("no group has two different answers that are judged, so there is no spread to learn from")
    elif verdict.spread.value < SPREAD:
        said.append(f"spread too small: {verdict.spread.value:.2g} within a group")
    if verdict.mass < MASS:
        said.append(f"mass too low: only {verdict.mass:.0%} is on the labels")
    if verdict.shift < SHIFT and verdict.score_shift < SCORE_SHIFT:
        said.append(f"answers ignored: the answer to another prompt moves the verdict by {verdict.shift:.2g} only")
    if verdict.auroc is not None and verdict.auroc.high < 0.5:
        said.append(f"wrong way round: wrong answers are rated higher (AUROC {verdict.auroc.value:.2f})")
    elif verdict.auroc is not None and verdict.auroc.low <= 0.5 <= verdict.auroc.high:
        said.append(f"cannot tell right from wrong: AUROC {verdict.auroc.value:.2f} is within chance")
    return said


def conclusions(asked: Asked) -> list[str]:
    """The end in words: which questions have signal, which have none and why, and which to take."""
    lines = []
    good = [v for v in asked.verdicts if not v.complaints]
    sure = [v for v in good if not math.isnan((v.auroc or v.spread).low)]
    for v in good:
        what, known, form = ("AUROC", v.auroc, ".2f") if v.auroc else ("spread within a group", v.spread, ".3g")
        why, mass = f"{what} {known.value:{form}}", f"label mass {v.mass:.0%}"
        if v in sure:
            lines.append(f"{v.name} has signal: {why} ({known.low:{form}} to {known.high:{form}}), {mass}.")
        else:
            lines.append(f"{v.name} may have signal: {why}, {mass}; from one prompt it cannot be known.")
    for v in (v for v in asked.verdicts if v.complaints):
        lines.append(f"{v.name} {'shows' if math.isnan(v.spread.value) else 'has'} none: {'; '.join(v.complaints)}.")
    lines += _best(sure)
    lines += asked.unknown
    if not good and not asked.unknown:
        lines.append("No question has signal: change the wording, the template, the read-out or the evaluator.")
    with_signal = {v.name for v in good}
    for one, two, r in asked.correlations:
        if abs(r) > 0.95 and {one, two} <= with_signal:
            lines.append(f"{one} and {two} say the same (correlation {r:.2f}): one of them is enough.")
    if asked.labels:
        lines.append(asked.labels)
    if good and all(v.auroc is None for v in good):
        lines.append("Without labels this says that answers are told apart, not that the better one is preferred.")
    return lines


def _best(good: Sequence[Verdict]) -> list[str]:
    """Which of several to take. A spread compares within one read-out only: nats there, points of a scale here."""
    ranked = [v for v in good if v.auroc is not None]
    if ranked:
        return [_first_of(ranked, "")] if len(good) > 1 else []
    lines = []
    readouts = list(dict.fromkeys(v.readout for v in good))
    for readout in readouts:
        same = [v for v in good if v.readout == readout]
        if len(same) > 1:
            lines.append(_first_of(same, f" read out as {readout}" if len(readouts) > 1 else ""))
    return lines


def _first_of(ranked: Sequence[Verdict], among: str) -> str:
    best, *others = ranked
    top = best.auroc or best.spread
    close = [v.name for v in others if (v.auroc or v.spread).high >= top.low]
    if not close:
        return f"Best{among} is {best.name}."
    return f"Best{among} is {best.name}, but its interval overlaps with that of {close[0]}" + (
        f" and {len(close) - 1} more: ask about more prompts." if len(close) > 1 else ": ask about more prompts."
    )


def no_labels(groups: Sequence[Sequence[Candidate]]) -> str:
    """Why there can be no AUROC although answers have labels; empty when there can, or when there are none."""
    labels = [c.right for group in groups for c in group if c.right is not None]
    if not labels or len(set(labels)) == 2:
        return ""
    which = "right" if labels[0] else "wrong"
    return f"All {len(labels)} labelled answers are {which}: AUROC and calibration need both kinds."


def differ(group: Sequence[Candidate]) -> bool:
    """Whether there is anything to tell apart among the answers to a prompt."""
    return len({c.sample.completion for c in group}) > 1


def unknown(groups: Sequence[Sequence[Candidate]]) -> list[str]:
    """What these prompts and answers cannot tell, whatever is asked about them."""
    said = []
    if len(groups) == 1:
        said.append(
            "One prompt tells nothing about others: there is no interval, and no answer to another prompt to put in "
            "place of its own. Ask about more prompts."
        )
    if not any(differ(group) for group in groups):
        said.append(
            "No prompt has two different answers: whether a question tells answers apart cannot be known from these."
        )
    return said

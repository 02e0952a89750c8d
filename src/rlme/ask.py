"""Try questions before training: what each question, evaluator, template and read-out says about real completions.

An advantage is made of differences within a group. A question on which all answers to a prompt get the same verdict,
on which the evaluator wants to say something other than the labels, or whose verdict does not change when the answer
is exchanged for one to another prompt, teaches nothing: this finds out before a run is spent on it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from rlme.ask_words import complaints as complaints
from rlme.ask_words import conclusions as conclusions
from rlme.ask_words import differ, no_labels, unknown
from rlme.candidates import Candidate, group_stds
from rlme.evaluators.base import Evaluator
from rlme.judgement import Judgement
from rlme.judging import Judging, Sample, judge, plan_questions
from rlme.questions import TEMPLATES, Question

RESAMPLES = 1000
CHUNK = 8
"""Prompts judged in one call."""
SWAPPED = 32
"""Completions that are judged again under another prompt."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass
class Verdict:
    """One question as one evaluator is asked it in one template and read-out: the numbers, and what they mean."""

    question: str
    ask: str
    evaluator: str
    template: str
    readout: str
    probability: float
    """Mean p(target)."""
    spread: Interval
    """Mean standard deviation of the score within a group."""
    mass: float
    shift: float
    """Mean absolute change of p(target) when the answer is exchanged for one to another prompt."""
    score_shift: float
    """The same for the score: where p(target) is small, as the marker's often is, only this shows a change."""
    failures: dict[str, int]
    completions: int
    tokens: float
    """Evaluator tokens per completion."""
    seconds: float
    """Per completion."""
    cost: float
    """Money per completion."""
    auroc: Interval | None = None
    within_group_auroc: float | None = None
    brier: float | None = None
    calibration_error: float | None = None
    complaints: list[str] = field(default_factory=list)
    """Why there is no signal; empty when there is."""

    @property
    def name(self) -> str:
        """What tells this row from the others."""
        return _name(self.question, self.evaluator, self.template, self.readout)


@dataclass
class Asked:
    """Everything `rlme ask` found out."""

    verdicts: list[Verdict]
    """Best first: by AUROC where there are labels, else by spread; those without signal last."""
    correlations: list[tuple[str, str, float]]
    """Correlation of the scores of two questions asked by the same evaluator in the same way."""
    liked: list[dict[str, Any]]
    """Most and least liked answer of a few groups by the best verdict's question."""
    labels: str = ""
    """Why there is no AUROC although some answers are known to be right or wrong."""
    unknown: list[str] = field(default_factory=list)
    """What these prompts and answers cannot tell, whatever is asked about them."""
    judgements: dict[str, list[list[Judgement]]] = field(default_factory=dict, repr=False)
    """Verdict name -> judgements per group."""

    def json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "verdicts": [asdict(v) for v in self.verdicts],
            "correlations": [{"a": a, "b": b, "correlation": r} for a, b, r in self.correlations],
            "labels": self.labels,
            "unknown": self.unknown,
            "liked": self.liked,
        }


def ask(
    groups: Sequence[Sequence[Candidate]],
    questions: Sequence[Question],
    evaluators: Sequence[Evaluator],
    variants: Sequence[Judging],
    *,
    shown: int = 3,
    advance: Callable[[int], None] = lambda prompts: None,
) -> Asked:
    """Ask every question of every evaluator in every variant (template and read-out) about every completion.

    `advance` is called with the number of prompts done, in all for each evaluator and variant. Questions are asked
    separately, whatever `joint` says: their own signal is what is looked for. A question that fixes its own template
    and read-out is asked once, not once for each variant.
    """
    completions = sum(len(group) for group in groups)
    swapped = exchanged(groups, SWAPPED)
    asked = Asked([], [], [], labels=no_labels(groups), unknown=unknown(groups))
    any_differ = any(differ(group) for group in groups)
    own: dict[str, str] = {}
    for variant in (replace(variant, joint=False) for variant in variants):
        for evaluator in evaluators:
            plans = plan_questions(evaluator, questions, variant)
            ways = [(_template_name(p.template.text, own), "reason" if p.reason else p.readout.name) for p in plans]
            new = [
                (question, way)
                for question, way in zip(questions, ways, strict=True)
                if _name(question.name, evaluator.name, *way) not in asked.judgements
            ]
            if not new:
                advance(len(groups))
                continue
            texts = [question for question, _ in new]
            started = time.perf_counter()
            judged: list[list[Judgement]] = []
            for some in chunks(groups):
                judged += judge([c.sample for group in some for c in group], texts, [evaluator], variant)
                advance(len(some))
            seconds = (time.perf_counter() - started) / max(1, completions * len(new))
            again = judge([s for _, s in swapped], texts, [evaluator], variant)
            for k, (question, way) in enumerate(new):
                column = _grouped([row[k] for row in judged], groups)
                moved = [(judged[i][k], row[k]) for (i, _), row in zip(swapped, again, strict=True)]
                verdict = _verdict(question, evaluator, way, column, moved, seconds)
                if not any_differ:
                    verdict.spread = bootstrap([])
                _against_labels(verdict, groups, column, turned=question.weight < 0)
                verdict.complaints = complaints(verdict)
                asked.verdicts.append(verdict)
                asked.judgements[verdict.name] = column
    asked.correlations = _correlations(asked)
    asked.verdicts.sort(key=lambda v: (bool(v.complaints), -(v.auroc.value if v.auroc else v.spread.value)))
    if asked.verdicts:
        asked.liked = most_and_least(groups, asked.judgements[asked.verdicts[0].name], shown)
    return asked


def _name(question: str, evaluator: str, template: str, readout: str) -> str:
    return f"{question} ({evaluator}, {template}/{readout})"


def _template_name(text: str, own: dict[str, str]) -> str:
    """A shipped template's name; the user's own ones are numbered."""
    shipped = next((name for name, template in TEMPLATES.items() if template.text == text), None)
    return shipped or own.setdefault(text, f"own {len(own) + 1}" if own else "own")


def chunks(groups: Sequence[Sequence[Candidate]]) -> Iterator[Sequence[Sequence[Candidate]]]:
    """A few groups at a time: enough to fill a forward pass, few enough to say how long it will take."""
    for start in range(0, len(groups), CHUNK):
        yield groups[start : start + CHUNK]


def exchanged(groups: Sequence[Sequence[Candidate]], limit: int) -> list[tuple[int, Sample]]:
    """(index of a completion, the same prompt with an answer to the next group's), spread over the groups.

    An answer that is equal to the one it would replace exchanges nothing, and is left out.
    """
    if len(groups) < 2:
        return []
    index = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    places = list(range(len(index)))
    random.Random(0).shuffle(places)
    result = []
    for place in places:
        g, i = index[place]
        other = groups[(g + 1) % len(groups)]
        theirs, ours = other[i % len(other)].sample, groups[g][i].sample
        if theirs.completion == ours.completion:
            continue
        answer = replace(ours, completion=theirs.completion, answer=theirs.answer, n_tokens=theirs.n_tokens)
        result.append((place, answer))
        if len(result) == limit:
            break
    return sorted(result, key=lambda item: item[0])


def _grouped(column: Sequence[Judgement], groups: Sequence[Sequence[Candidate]]) -> list[list[Judgement]]:
    result, start = [], 0
    for group in groups:
        result.append(list(column[start : start + len(group)]))
        start += len(group)
    return result


def _verdict(
    question: Question,
    evaluator: Evaluator,
    way: tuple[str, str],
    judged: list[list[Judgement]],
    moved: Sequence[tuple[Judgement, Judgement]],
    seconds: float,
) -> Verdict:
    flat = [j for group in judged for j in group]
    known = [j for j in flat if j.score is not None]
    failures: dict[str, int] = {}
    for j in flat:
        if j.failure is not None:
            failures[j.failure.value] = failures.get(j.failure.value, 0) + 1
    shifts = [
        abs(a.probability - b.probability) for a, b in moved if a.probability is not None and b.probability is not None
    ]
    score_shifts = [abs(a.score - b.score) for a, b in moved if a.score is not None and b.score is not None]
    scores = [[j.score for j in group] for group in judged]
    return Verdict(
        question=question.name,
        ask=question.ask,
        evaluator=evaluator.name,
        template=way[0],
        readout=way[1],
        probability=fmean([j.probability for j in known if j.probability is not None]) if known else math.nan,
        spread=bootstrap(group_stds(scores)),
        mass=fmean([j.mass for j in known if j.mass is not None]) if known else math.nan,
        shift=fmean(shifts) if shifts else math.nan,
        score_shift=fmean(score_shifts) if score_shifts else math.nan,
        failures=failures,
        completions=len(flat),
        tokens=fmean([j.tokens_in + j.tokens_out for j in flat]) if flat else 0.0,
        seconds=seconds,
        cost=fmean([j.cost for j in flat]) if flat else 0.0,
    )


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one number per group (prompt), with its 2.5 and 97.5 percentiles over resampled groups.

    Of a single group the interval is unknown (NaN).
    """
    if len(values) < 2:
        return Interval(values[0] if values else math.nan, math.nan, math.nan)
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Interval(fmean(values), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1])


def _against_labels(
    verdict: Verdict, groups: Sequence[Sequence[Candidate]], judged: list[list[Judgement]], *, turned: bool
) -> None:
    """AUROC and calibration; `turned`: the question's weight is negative, its target is a wrong answer's."""
    import numpy as np

    from rlme.judgebench import metrics

    rows = [
        (g, c.right, -j.score if turned else j.score, 1 - j.probability if turned else j.probability)
        for g, (group, js) in enumerate(zip(groups, judged, strict=True))
        for c, j in zip(group, js, strict=True)
        if c.right is not None and j.score is not None and j.probability is not None
    ]
    labels = [right for _, right, _, _ in rows]
    if len(set(labels)) < 2:
        return
    y_N = np.array(labels, dtype=np.float64)
    score_N, p_N = np.array([s for *_, s, _ in rows]), np.array([p for *_, p in rows])
    weights_RN = metrics.bootstrap_weights([str(g) for g, *_ in rows], 200, 0)
    found = metrics.estimate(metrics.auroc(score_N, y_N, weights_RN))
    several = len({g for g, *_ in rows}) > 1
    verdict.auroc = (
        Interval(found.value, found.low, found.high) if several else Interval(found.value, math.nan, math.nan)
    )
    verdict.brier = float(metrics.brier(p_N, y_N, weights_RN[:1])[0])
    verdict.calibration_error = float(metrics.ece(p_N, y_N, weights_RN[:1])[0])
    wins = pairs = 0.0
    for g in range(len(groups)):
        right = [s for i, ok, s, _ in rows if i == g and ok]
        wrong = [s for i, ok, s, _ in rows if i == g and not ok]
        wins += sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
        pairs += len(right) * len(wrong)
    verdict.within_group_auroc = wins / pairs if pairs else None


def _correlations(asked: Asked) -> list[tuple[str, str, float]]:
    result = []
    for i, one in enumerate(asked.verdicts):
        for two in asked.verdicts[i + 1 :]:
            same_way = (one.evaluator, one.template, one.readout) == (two.evaluator, two.template, two.readout)
            if not same_way or one.question == two.question:
                continue
            pairs = [
                (a.score, b.score)
                for left, right in zip(asked.judgements[one.name], asked.judgements[two.name], strict=True)
                for a, b in zip(left, right, strict=True)
                if a.score is not None and b.score is not None
            ]
            r = correlation(pairs)
            if r is not None:
                result.append((one.name, two.name, r))
    return result


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's r; None when it is not defined."""
    if len(pairs) < 3:
        return None
    mx, my = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
    scale = math.sqrt(sum((x - mx) ** 2 for x, _ in pairs) * sum((y - my) ** 2 for _, y in pairs))
    return sum((x - mx) * (y - my) for x, y in pairs) / scale if scale > 1e-12 else None


def most_and_least(
    groups: Sequence[Sequence[Candidate]], judged: Sequence[Sequence[Judgement]], shown: int
) -> list[dict[str, Any]]:
    """The most and least liked answer of the `shown` groups whose scores lie furthest apart."""
    pairs = []
    for group, js in zip(groups, judged, strict=True):
        scored = sorted(
            ((j.score, i) for i, j in enumerate(js) if j.score is not None), key=lambda item: item[0], reverse=True
        )
        if len(scored) > 1:
            (high, most), (low, least) = scored[0], scored[-1]
            sides = [
                {
                    "completion": group[i].sample.completion,
                    "probability": js[i].probability,
                    "score": score,
                    "right": group[i].right,
                }
                for score, i in ((high, most), (low, least))
            ]
            pairs.append((high - low, {"prompt": group[0].sample.prompt_text(), "most": sides[0], "least": sides[1]}))
    return [pair for _, pair in sorted(pairs, key=lambda item: -item[0])[:shown]]

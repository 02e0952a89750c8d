"""Best of n by the same questions as in training, with abstention (Ren et al., arXiv 2312.09300).

Sample & Eval: take the answer with the highest p(target). Sample & Select: show all answers as lettered choices and
take the likeliest letter. Hybrid: choose by the letters, trust by p(target), minus the probability of the extra choice
"none of these" where that is asked. All letters come from one prompt that has the extra choice, asked in two orders
(as sampled and reversed) whose probabilities are averaged; Sample & Select drops the extra choice and renormalises.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rlme.ask import Interval, bootstrap, chunks
from rlme.candidates import Candidate, labelled
from rlme.control_tokens import harmless
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import Answer, Judgement, Request
from rlme.judging import Judging, judge
from rlme.questions import Question, log_sum_exp
from rlme.reward import weighted_sum

NONE = "None of these is right."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Choice = tuple[int, float] | None
"""(index of the chosen answer in its group, how far to trust it); None when it could not be judged."""


@dataclass
class Chosen:
    """One way to choose, applied to every group."""

    name: str
    evaluator: str
    choices: list[Choice]
    failures: dict[str, int] = field(default_factory=dict)
    """Judgements that failed, by kind."""


@dataclass
class Method:
    """How well one way to choose does on labelled prompts."""

    name: str
    evaluator: str
    accuracy: Interval
    """Of the chosen answers, over the prompts where one was chosen."""
    missing: int
    """Prompts for which no answer could be judged."""
    calibration_auc: float | None = None
    """How often a right choice is trusted more than a wrong one."""
    selective_auc: float | None = None
    """Area under the curve of accuracy against coverage, the most trusted choices first. Coverage is a share of all
    prompts: those that could not be judged are abstentions, and the curve ends before them."""
    at_half: float | None = None
    """Accuracy with the most trusted choices on half of the prompts; None when fewer could be judged."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(coverage, accuracy), up to the share of the prompts that could be judged."""
    threshold: float | None = None
    """Abstain below it: set on half of the prompts for the wanted accuracy."""
    coverage: float | None = None
    """Of the other half of the prompts, the share that is answered with that threshold ..."""
    kept_accuracy: float | None = None
    """... and the share of those answers that is right."""


@dataclass
class Report:
    """What `rlme select` found."""

    prompts: int
    answers: float
    """Mean answers per prompt."""
    methods: list[Method]
    """Best first: by how many choices are right, equal ones by selective-AUC; empty without labels."""
    single: float | None = None
    """Accuracy of one answer taken at random."""
    possible: float | None = None
    """Share of the prompts with at least one right answer: the ceiling of any choice."""
    wanted: float | None = None
    unlabelled: str = ""
    """Why nothing is measured; empty when it is."""
    failures: dict[str, int] = field(default_factory=dict)
    """Judgements of the questions that failed, by kind."""

    def json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return asdict(self)


def choose(
    groups: Sequence[Sequence[Candidate]],
    questions: Sequence[Question],
    evaluators: Sequence[Evaluator],
    evaluator_weights: Sequence[float],
    judging: Judging,
    *,
    advance: Callable[[int], None] = lambda prompts: None,
) -> list[Chosen]:
    """Every way to choose, for every group. `advance` is called with the number of prompts an evaluator has done."""
    if not questions:
        raise InputError("rlme select needs at least one question in the configuration")
    if crowded := next((len(group) for group in groups if len(group) >= len(LETTERS)), None):
        raise InputError(f"a prompt has {crowded} answers; at most {len(LETTERS) - 1} can be lettered")
    result = [Chosen("first", "", [(0, 0.0) for _ in groups])]
    if all(candidate.sample.answer is not None for group in groups for candidate in group):
        result.append(Chosen("vote", "", [_vote(group) for group in groups]))
    all_judged: list[list[Judgement]] = [[] for group in groups for _ in group]
    for evaluator in evaluators:
        judged: list[list[Judgement]] = []
        letters: list[list[float] | None] = []
        for some in chunks(groups):
            judged += judge([c.sample for group in some for c in group], questions, [evaluator], judging)
            letters += choice_probabilities(some, evaluator)
            advance(len(some))
        for row, more in zip(all_judged, judged, strict=True):
            row += more
        trust = _by_group([_probability(row, questions) for row in judged], groups)
        result += [
            Chosen("eval", evaluator.name, [_highest(p) for p in trust]),
            Chosen("select", evaluator.name, [_highest(p and _renormalised(p[:-1])) for p in letters]),
            Chosen("hybrid", evaluator.name, [_hybrid(p, t, 0.0) for p, t in zip(letters, trust, strict=True)]),
            Chosen("hybrid, none", evaluator.name, [_hybrid(p, t, 1.0) for p, t in zip(letters, trust, strict=True)]),
        ]
    weights = [v * q.weight for v in evaluator_weights for q in questions]
    rewards = _by_group([weighted_sum(row, weights) for row in all_judged], groups)
    failed = Counter(j.failure.value for row in all_judged for j in row if j.failure is not None)
    result.append(Chosen("reward", "all", [_highest(r) for r in rewards], dict(failed)))
    return result


def _by_group(values: Sequence[float | None], groups: Sequence[Sequence[Candidate]]) -> list[list[float | None]]:
    result, start = [], 0
    for group in groups:
        result.append(list(values[start : start + len(group)]))
        start += len(group)
    return result


def _probability(row: Sequence[Judgement], questions: Sequence[Question]) -> float | None:
    """Mean p(target), or 1 - p under a negative weight, weighted as the questions are; None when a question that counts
    has no answer."""
    counted = [
        (abs(q.weight), j.probability if q.weight > 0 or j.probability is None else 1 - j.probability)
        for q, j in zip(questions, row, strict=True)
        if q.weight
    ]
    known = [(w, p) for w, p in counted if p is not None]
    if not known or len(known) < len(counted):
        return None
    return sum(w * p for w, p in known) / sum(w for w, _ in known)


def _highest(values: Sequence[float | None] | None) -> Choice:
    known = [(v, -i) for i, v in enumerate(values or ()) if v is not None]
    if not known:
        return None
    value, place = max(known)
    return -place, value


def _renormalised(values: Sequence[float | None]) -> list[float | None]:
    total = sum(v for v in values if v is not None)
    return [None if v is None or total <= 0 else v / total for v in values]


def _hybrid(letters: list[float] | None, trust: list[float | None], none: float) -> Choice:
    chosen = _highest(letters[:-1] if letters else None)
    if chosen is None or letters is None:
        return None
    p = trust[chosen[0]]
    return None if p is None else (chosen[0], p - none * letters[-1])


def _vote(group: Sequence[Candidate]) -> Choice:
    """The first answer of the largest set of equal extracted answers; trusted by its share (self-consistency)."""
    votes = Counter(c.sample.answer for c in group if c.sample.answer)
    if not votes:
        return None
    answer, count = votes.most_common(1)[0]
    return next(i for i, c in enumerate(group) if c.sample.answer == answer), count / len(group)


def choice_probabilities(groups: Sequence[Sequence[Candidate]], evaluator: Evaluator) -> list[list[float] | None]:
    """Per group: the probability of each answer and, last, of "none of these", among the letters; None if it failed.

    Asked in two orders, whose probabilities are averaged, so that an evaluator's liking for a letter cancels to first
    order.
    """
    plans: list[tuple[int, list[int]]] = []
    requests: list[Request] = []
    spelled: list[dict[str, tuple[str, ...]]] = []
    for g, group in enumerate(groups):
        for order in (list(range(len(group))), list(reversed(range(len(group))))):
            letters = LETTERS[: len(group) + 1]
            kept = set(evaluator.spellings([s for letter in letters for s in (letter, f" {letter}")]))
            spellings = {a: tuple(s for s in (a, f" {a}") if s in kept) for a in letters}
            if missing := next((letter for letter, ss in spellings.items() if not ss), None):
                raise InputError(f"evaluator {evaluator.name!r}: its tokenizer cannot spell the letter {missing!r}")
            text = harmless(_choice_text(group, order), evaluator)
            context = ({"role": "user", "content": text},) if evaluator.chat else f"{text}\nLetter:"
            requests.append(Request(context, tuple(s for ss in spellings.values() for s in ss)))  # type: ignore[arg-type]
            plans.append((g, order))
            spelled.append(spellings)
    totals: list[list[float] | None] = [[0.0] * (len(group) + 1) for group in groups]
    for (g, order), spellings, request, answer in zip(
        plans, spelled, requests, evaluator.logprobs(requests), strict=True
    ):
        found = _letter_probabilities(answer, request, spellings)
        total = totals[g]
        if found is None or total is None:
            totals[g] = None
            continue
        for place, p in zip([*order, len(order)], found, strict=True):
            total[place] += p / 2
    return totals


def _choice_text(group: Sequence[Candidate], order: Sequence[int]) -> str:
    lines = ["Here is a message and several answers to it.", "", "### Message", group[0].sample.prompt_text().strip()]
    for letter, i in zip(LETTERS, order, strict=False):
        lines += ["", f"### Answer {letter}", group[i].sample.completion.strip()]
    lines += ["", f"### Answer {LETTERS[len(order)]}", NONE, ""]
    lines += ["Which answer is right? Reply with its letter and nothing else."]
    return "\n".join(lines)


def _letter_probabilities(
    answer: Answer, request: Request, spellings: dict[str, tuple[str, ...]]
) -> list[float] | None:
    if answer.logprobs is None or any(math.isnan(lp) for lp in answer.logprobs):
        return None
    values = dict(zip(request.continuations, answer.logprobs, strict=True))
    letters = [log_sum_exp([values[s] for s in ss]) for ss in spellings.values()]
    total = log_sum_exp(letters)
    return None if math.isinf(total) else [math.exp(lp - total) for lp in letters]


def evaluate(
    groups: Sequence[Sequence[Candidate]], chosen: Sequence[Chosen], *, accuracy: float | None = None, seed: int = 0
) -> Report:
    """Measure every way to choose on labelled groups; without labels the report has the counts, and why.

    `accuracy`: set the threshold for abstaining so that this share of the given answers is right, on half of the
    prompts (chosen by `seed`), and measure it on the other half.
    """
    n = len(groups)
    report = Report(n, fmean([len(g) for g in groups]) if groups else 0.0, [], wanted=accuracy)
    if not labelled(groups):
        report.unlabelled = _unlabelled(groups)
        if accuracy is not None:
            raise InputError(f"--accuracy needs to know right answers and wrong ones, and {report.unlabelled}")
        return report
    report.single = fmean([fmean([bool(c.right) for c in group]) for group in groups])
    report.possible = fmean([any(c.right for c in group) for group in groups])
    half = set(random.Random(seed).sample(range(n), n // 2))
    for way in chosen:
        trusted = {
            g: (choice[1], bool(groups[g][choice[0]].right))
            for g, choice in enumerate(way.choices)
            if choice is not None
        }
        method = Method(
            way.name, way.evaluator, bootstrap([float(right) for _, right in trusted.values()]), n - len(trusted)
        )
        pairs = list(trusted.values())
        if len({score for score, _ in pairs}) > 1:
            method.calibration_auc = calibration_auc(pairs)
            method.curve = coverage_curve(pairs, n)
            method.selective_auc = sum(a for _, a in method.curve) / n
            half_way = max(1, round(n / 2))
            method.at_half = method.curve[half_way - 1][1] if len(pairs) >= half_way else None
        if accuracy is not None:
            method.threshold = threshold_for([trusted[g] for g in half if g in trusted], accuracy)
            if method.threshold is not None:
                rest = [g for g in range(n) if g not in half]
                kept = [right for g in rest if g in trusted for s, right in [trusted[g]] if s >= method.threshold]
                method.coverage = len(kept) / len(rest)
                method.kept_accuracy = fmean(kept) if kept else None
        report.methods.append(method)
    report.methods.sort(key=lambda m: (-_right(m, n), -(m.selective_auc or 0.0)))
    return report


def _right(method: Method, prompts: int) -> int:
    """Right choices of all prompts: a way that could judge only one, and was right there, is not the best."""
    judged = prompts - method.missing
    return round(method.accuracy.value * judged) if judged else 0


def _unlabelled(groups: Sequence[Sequence[Candidate]]) -> str:
    labels = [c.right for group in groups for c in group]
    unknown = labels.count(None)
    if unknown == len(labels):
        return "it is not known which answers are right (--label, or data.answer)"
    if unknown:
        return f"of {unknown} of the {len(labels)} answers it is not known whether they are right"
    return f"all {len(labels)} answers are {'right' if labels[0] else 'wrong'}"


def calibration_auc(pairs: Sequence[tuple[float, bool]]) -> float | None:
    """Probability that a right choice is trusted more than a wrong one, ties half; None when all are right or wrong."""
    right, wrong = [s for s, ok in pairs if ok], [s for s, ok in pairs if not ok]
    if not right or not wrong:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (len(right) * len(wrong))


def coverage_curve(pairs: Sequence[tuple[float, bool]], prompts: int | None = None) -> list[tuple[float, float]]:
    """(coverage, accuracy) with the k most trusted choices kept, k = 1..n; equally trusted ones count their mean.

    Coverage is a share of `prompts` (default: as many as there are choices): without a choice, one is an abstention.
    """
    by_score: dict[float, list[bool]] = {}
    for score, ok in pairs:
        by_score.setdefault(score, []).append(ok)
    curve, kept, right = [], 0, 0.0
    for score in sorted(by_score, reverse=True):
        share = fmean(by_score[score])
        for _ in by_score[score]:
            kept, right = kept + 1, right + share
            curve.append((kept / (prompts or len(pairs)), right / kept))
    return curve


def threshold_for(pairs: Sequence[tuple[float, bool]], accuracy: float) -> float | None:
    """The lowest trust at which the kept choices are right at least that often; None when there is none."""
    found, kept, right = None, 0, 0
    for score in sorted({s for s, _ in pairs}, reverse=True):
        new = [ok for s, ok in pairs if s == score]
        kept, right = kept + len(new), right + sum(new)
        if right / kept >= accuracy:
            found = score
    return found


def write_chosen(groups: Sequence[Sequence[Candidate]], chosen: Sequence[Chosen], report: Report, path: Path) -> None:
    """One JSON line per prompt: the answer chosen by the best method (without labels: by the reward), its trust, and
    whether the threshold says to abstain."""
    best = report.methods[0] if report.methods else None
    way = next(
        w for w in chosen if (w.name, w.evaluator) == ((best.name, best.evaluator) if best else ("reward", "all"))
    )
    with open(path, "w", encoding="utf-8") as file:
        for group, choice in zip(groups, way.choices, strict=True):
            threshold = best.threshold if best else None
            never = report.wanted is not None and threshold is None  # no trust is enough
            line = {
                "prompt": group[0].sample.prompt,
                "completion": None if choice is None else group[choice[0]].sample.completion,
                "chosen_by": way.name,
                "trust": None if choice is None else choice[1],
                "abstain": choice is None or never or (threshold is not None and choice[1] < threshold),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def sentences(report: Report) -> list[str]:
    """The report in words."""
    kinds = ", ".join(f"{kind} x{n}" for kind, n in report.failures.items())
    failed = [f"{sum(report.failures.values())} judgements failed ({kinds})."] if report.failures else []
    if not report.methods:
        return [
            f"{report.prompts} prompts with {report.answers:g} answers each; {report.unlabelled}, so nothing is "
            "measured and no threshold can be set.",
            *failed,
        ]
    assert report.single is not None and report.possible is not None
    best = report.methods[0]
    lines = [
        f"One answer at random is right in {report.single:.1%}; a right one is among the {report.answers:g} in "
        f"{report.possible:.1%}: no choice can do better.",
        f"Best is {best.name}{f' by {best.evaluator}' if best.evaluator else ''}: right in {best.accuracy.value:.1%}"
        + (f", and in {best.at_half:.1%} of the more trusted half." if best.at_half is not None else "."),
    ]
    if report.wanted is not None:
        if best.threshold is None:
            lines.append(
                f"No threshold reaches {report.wanted:.0%} on the prompts that set it: abstain always, or ask less."
            )
        else:
            lines.append(
                f"For {report.wanted:.0%} abstain below {best.threshold:.3g}: on the other half of the prompts "
                f"{best.coverage or 0:.0%} are answered, "
                + ("none" if best.kept_accuracy is None else f"{best.kept_accuracy:.1%}")
                + " of them right."
            )
    missing = [m for m in report.methods if m.missing]
    if missing:
        lines.append("; ".join(f"{m.name}: {m.missing} prompts could not be judged" for m in missing) + ".")
    return lines + failed

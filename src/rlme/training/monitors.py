"""What is watched while a run trains. Nothing in this file feeds back into the reward.

`batch_monitors` turns the rows of one step (the columns of `rollouts/*.parquet`) into numbers, `Alarm` says
when the reward rises while gold or a held-out evaluator falls, and `best_step` chooses a checkpoint by
anything but the reward. Imports without torch. A number that does not apply is absent: never 0, never NaN.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

Row = Mapping[str, Any]
GOLD = "gold/accuracy"

# Text that speaks to whoever grades it. The paper's collapsed runs assert their own correctness instead of
# deriving an answer (arXiv 2601.21268, sections 4.5 and C.4); marker and labels are answers to our templates.
_ADDRESSES_EVALUATOR = re.compile(
    r"""\b(?:the|this|my|our)\ (?:\w+\ )?(?:answer|solution|response|reply|result)\ (?:above\ )?
            (?:is|was|must\ be)\ (?:\w+\ )?(?:correct|right|accurate|valid|verified)\b
      | \bthis\ is\ the\ (?:only\ )?(?:correct|right)\ (?:answer|solution|conclusion)\b
      | \bonly\ (?:logical|possible|correct)\ conclusion\b
      | \b(?:dear|hello|note\ to(?:\ the)?)\ (?:evaluator|grader|judge|reviewer)\b
      | \b(?:the\ )?(?:evaluator|grader|judge)\ (?:should|must|will|can)\b
      | \b(?:please\ )?(?:answer|respond|reply|say)\ (?:with\ )?["'*]*yes\b
      | \b(?:full|maximum|perfect)\ (?:marks|score|rating)\b
      | ø""",
    re.IGNORECASE | re.VERBOSE,
)


def addresses_evaluator(completion: str) -> bool:
    """Whether a completion speaks to its grader ("the answer is correct", "answer YES", the marker ø)."""
    return _ADDRESSES_EVALUATOR.search(completion) is not None


def repetition(completion: str, n: int = 4) -> float | None:
    """Share of a text's word n-grams that occurred before in it, in [0, 1); None below n words."""
    words = completion.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def batch_monitors(rows: Sequence[Row]) -> dict[str, float]:
    """Every metric of `metrics.jsonl` that follows from a batch's rows.

    Rows are grouped by `group`, or `prompt_index` where there is none. Gold numbers use the rows that have both gold
    and a reward: `gold/auroc` over the whole batch; `gold/within_group_auroc`, the share of (right, wrong) pairs of one
    group in which the right answer has the higher reward (a tie counts half); `gold/pointbiserial`, the correlation of
    reward and correctness after both lose their group's mean; `gold/best_is_right`, the share of groups whose
    best-rewarded answer is right (groups of one answer do not count). The last three are what a group-relative
    advantage is made of.
    """
    if not rows:
        return {}
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("group", row["prompt_index"])].append(row)
    return {
        **_rewards(rows, groups),
        **_gold(rows, groups),
        **_completions(rows, groups),
        **_judgements(rows),
        **_agreement(groups),
    }


def heldout_values(rows: Sequence[Row]) -> dict[str, float]:
    """What `Alarm` and `best_step` look at: gold accuracy, and the mean p(target) of each weight-0 judgement (but of
    questions with a negative weight, whose fall is no bad sign: 0 times it is -0.0).

    Keys as in `batch_monitors`: `gold/accuracy`, `judge/<evaluator>/<question>/probability`; values in [0,
    1].
    """
    metrics = batch_monitors(rows)
    weights: dict[str, float] = defaultdict(float)
    for judgement in _all_judgements(rows):
        key = f"judge/{judgement['evaluator']}/{judgement['question']}/probability"
        weights[key] = max(weights[key], abs(judgement["weight"]), math.copysign(1.0, judgement["weight"]) < 0)
    held_out = [key for key, weight in weights.items() if weight == 0]
    return {key: metrics[key] for key in [GOLD, *held_out] if key in metrics}


def _all_judgements(rows: Iterable[Row]) -> Iterable[Mapping[str, Any]]:
    return (judgement for row in rows for judgement in row.get("judgements") or ())


def _rewards(rows: Sequence[Row], groups: Mapping[Any, list[Row]]) -> dict[str, float]:
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    metrics = {"reward_missing": 1 - len(rewards) / len(rows)}
    if rewards:
        metrics |= {"reward": fmean(rewards), "reward_std": pstdev(rewards)}
        known = [[r["reward"] for r in group if r["reward"] is not None] for group in groups.values()]
        if flat := [max(group) - min(group) < 1e-12 for group in known if len(group) > 1]:
            metrics["frac_groups_flat"] = fmean(flat)
    return metrics


def _gold(rows: Sequence[Row], groups: Mapping[Any, list[Row]]) -> dict[str, float]:
    correct = [row["correct"] for row in rows if row["correct"] is not None]
    if not correct:
        return {}
    metrics = {GOLD: fmean(correct)}
    both = [row for row in rows if row["correct"] is not None and row["reward"] is not None]
    right = [row["reward"] for row in both if row["correct"]]
    wrong = [row["reward"] for row in both if not row["correct"]]
    if right and wrong:
        metrics["gold/auroc"] = _wins(right, wrong) / (len(right) * len(wrong))
    wins, pairs, best, centred = 0.0, 0, [], []
    for group in groups.values():
        scored = [(r["reward"], bool(r["correct"])) for r in group if None not in (r["reward"], r["correct"])]
        if not scored:
            continue
        right = [reward for reward, ok in scored if ok]
        wrong = [reward for reward, ok in scored if not ok]
        wins, pairs = wins + _wins(right, wrong), pairs + len(right) * len(wrong)
        if len(scored) > 1:
            top = max(reward for reward, _ in scored)
            best.append(fmean(ok for reward, ok in scored if reward == top))
        mean_reward, mean_ok = fmean(r for r, _ in scored), fmean(ok for _, ok in scored)
        centred += [(reward - mean_reward, ok - mean_ok) for reward, ok in scored]
    if pairs:
        metrics["gold/within_group_auroc"] = wins / pairs
    if best:
        metrics["gold/best_is_right"] = fmean(best)
    scale = math.sqrt(sum(r * r for r, _ in centred) * sum(c * c for _, c in centred))
    if scale > 1e-12:
        metrics["gold/pointbiserial"] = sum(r * c for r, c in centred) / scale
    return metrics


def _wins(high: Sequence[float], low: Sequence[float]) -> float:
    """Pairs in which `high` is above `low`, ties counting half (Mann-Whitney's U)."""
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low)


def _completions(rows: Sequence[Row], groups: Mapping[Any, list[Row]]) -> dict[str, float]:
    texts = [row["completion"] for row in rows]
    metrics = {
        "completions/mean_tokens": fmean(row["tokens"] for row in rows),
        "completions/mean_chars": fmean(len(text) for text in texts),
        "completions/clipped": fmean(bool(row["truncated"]) for row in rows),
        "completions/addresses_evaluator": fmean(addresses_evaluator(text) for text in texts),
    }
    if distinct := [len({r["completion"] for r in g}) / len(g) for g in groups.values() if len(g) > 1]:
        metrics["completions/distinct"] = fmean(distinct)
    repeated = [share for text in texts if (share := repetition(text)) is not None]
    if repeated:
        metrics["completions/repetition"] = fmean(repeated)
    return metrics


def _judgements(rows: Sequence[Row]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    failures: Counter[str] = Counter()
    for row in rows:
        by_question: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for judgement in row.get("judgements") or ():
            name = f"judge/{judgement['evaluator']}/{judgement['question']}"
            if judgement["failure"] is not None:
                failures[f"{name}/failures/{judgement['failure']}"] += 1
            for key in ("score", "probability", "mass"):
                if judgement[key] is not None:
                    values[f"{name}/{key}"].append(judgement[key])
            if judgement["score"] is not None:
                by_question[judgement["question"]].append((abs(judgement["weight"]), judgement["score"]))
        for question, weighted in by_question.items():
            total = sum(weight for weight, _ in weighted)
            held_out = total == 0  # every evaluator of it has weight 0: a plain mean
            values[f"question/{question}/score"].append(
                fmean(s for _, s in weighted) if held_out else sum(w * s for w, s in weighted) / total
            )
    return {**{key: fmean(numbers) for key, numbers in values.items()}, **failures}


def _agreement(groups: Mapping[Any, list[Row]]) -> dict[str, float]:
    """Two answers of one group, one question, two evaluators: how often both order the answers the same way.

    1: always; 0.5: no better than chance (also where one evaluator cannot tell the answers apart).
    """
    same, total = 0.0, 0
    for group in groups.values():
        scores: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for i, row in enumerate(group):
            for judgement in row.get("judgements") or ():
                if judgement["score"] is not None:
                    scores[judgement["question"]][judgement["evaluator"]][i] = judgement["score"]
        for by_evaluator in scores.values():
            for one, two in combinations(by_evaluator.values(), 2):
                for a, b in combinations(sorted(one.keys() & two.keys()), 2):
                    sign = (one[a] - one[b]) * (two[a] - two[b])
                    same, total = same + (1.0 if sign > 0 else 0.5 if sign == 0 else 0.0), total + 1
    return {"judge/agreement": same / total} if total else {}


@dataclass
class _Series:
    """The measurements of one held-out number, and the best stretch of them seen so far."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    best: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    """Shortest length looked at -> (lower bound of the mean, mean, last step) of the best stretch."""


@dataclass
class Alarm:
    """Says, once per held-out number, that the reward rises while that number falls.

    Checked at every measurement of a held-out value in [0, 1] on `prompts` prompts. One measurement of a
    level p has the standard error s(p) = sqrt(p (1 - p) / prompts), taken as at least 0.02 because the
    level itself wanders.

    1. *The reward rises*: its mean over the last `reward_window` steps is the highest at any measurement so
       far, and above that of the first one.
    2. *The held-out number falls*: the mean of the last m measurements, for m = 1, 2 or 3, plus
       `upper` s / sqrt(m), is below the best lower bound of an earlier stretch: over all runs of L >=
       `stretch` consecutive measurements, the highest mean - `lower` s / sqrt(L). While there are fewer
       than `stretch` earlier measurements, stretches of three serve and both bounds are twice as wide.

    Both must hold. What this catches, how late, and how often it is wrong: docs/monitors.md. The state
    follows from the metrics alone: after a resume, feed it the earlier steps again (`replay`).
    """

    prompts: int = 200
    reward_window: int = 20
    stretch: int = 7
    lower: float = 2.0
    upper: float = 2.75
    _rewards: list[float] = field(default_factory=list, repr=False)
    _first: float | None = field(default=None, repr=False)
    _highest: float = field(default=-math.inf, repr=False)
    _series: dict[str, _Series] = field(default_factory=dict, repr=False)
    _fired: dict[str, int] = field(default_factory=dict, repr=False)

    def update(self, step: int, reward: float | None, heldout: Mapping[str, float] | None = None) -> str | None:
        """Take in one training step; returns a sentence when the alarm fires at it.

        `reward`: the batch's mean reward, None when every completion's was missing. `heldout`: what was
        measured at this step (empty on most steps), as `heldout_values` gives it.
        """
        if reward is not None and math.isfinite(reward):
            self._rewards = [*self._rewards, reward][-self.reward_window :]
        if not heldout or not self._rewards:
            return None
        recent_reward = fmean(self._rewards)
        if self._first is None:
            self._first = recent_reward
        # One that has come to its end is still the highest; one that never moved, up to rounding, is not.
        rises = recent_reward >= self._highest and recent_reward > self._first + 1e-9 * max(1.0, abs(self._first))
        self._highest = max(self._highest, recent_reward)
        falls = []
        for name, value in heldout.items():
            if not math.isfinite(value):
                continue
            series = self._series.setdefault(name, _Series())
            fall = self._fall(series, value)
            self._add(series, step, value)
            if rises and fall is not None and name not in self._fired:
                best, last_good, now = fall
                self._fired[name] = last_good
                falls.append(f"{spoken(name)} fell from {best:.3f} (up to step {last_good}) to {now:.3f}")
        if not falls:
            return None
        return (
            f"the reward rose to {recent_reward:.4g}, its highest so far, but on held-out prompts "
            f"{' and '.join(falls)}: the policy probably pleases its evaluator instead of answering better. "
            f"Prefer the checkpoint of step {self.before}."
        )

    @property
    def before(self) -> int | None:
        """The checkpoint to keep: last step of the best stretch before the first alarm. None while silent."""
        return min(self._fired.values()) if self._fired else None

    @property
    def candidates(self) -> set[int]:
        """Steps that `before` names, or may name at a later measurement: their checkpoints are worth keeping."""
        best = {last for series in self._series.values() for _, _, last in series.best.values()}
        return best | set(self._fired.values())

    def _error(self, level: float) -> float:
        return max(0.02, math.sqrt(max(level * (1 - level), 0.0) / self.prompts))

    def _margin(self, shortest: int) -> float:
        return 1.0 if shortest == self.stretch else 2.0

    def _add(self, series: _Series, step: int, value: float) -> None:
        """Look at every stretch that ends with the new measurement."""
        series.steps.append(step)
        series.values.append(value)
        total = 0.0
        for length, earlier in enumerate(reversed(series.values), start=1):
            total += earlier
            mean = total / length
            for shortest in (3, self.stretch):
                if length < shortest:
                    continue
                bound = mean - self._margin(shortest) * self.lower * self._error(mean) / math.sqrt(length)
                if shortest not in series.best or bound > series.best[shortest][0]:
                    series.best[shortest] = (bound, mean, step)

    def _fall(self, series: _Series, value: float) -> tuple[float, int, float] | None:
        """(mean of the best stretch, its last step, mean now) when rule 2 holds."""
        shortest = self.stretch if len(series.values) >= self.stretch else 3
        if shortest not in series.best:
            return None
        bound, best, last_step = series.best[shortest]
        for m in (1, 2, 3):
            now = fmean([*series.values, value][-m:])
            if now + self._margin(shortest) * self.upper * self._error(best) / math.sqrt(m) < bound:
                return best, last_step, now
        return None


def replay(alarm: Alarm, records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Feed an alarm the steps of an earlier `metrics.jsonl`; `names`: its held-out keys, without `eval/`."""
    for record in records:
        alarm.update(
            record["step"],
            judged_reward(record),
            {name: record[f"eval/{name}"] for name in names if record.get(f"eval/{name}") is not None},
        )


def judged_part(rows: Iterable[Row]) -> dict[str, float]:
    """Mean of the judged part of hybrid rewards (RLME eq. 3), before any normalisation, as `reward/judged`."""
    parts = [
        [(j["weight"], j["score"]) for j in row["judgements"] if j["weight"]]
        for row in rows
        if row["reward"] is not None
    ]
    sums = [math.fsum(weight * score for weight, score in part) for part in parts]
    return {"reward/judged": fmean(sums)} if sums else {}


def judged_reward(record: Mapping[str, Any]) -> float | None:
    """What training on judgements pushes up. A hybrid reward holds it only in part, and normalised over the batch that
    is 0 at all times."""
    return record.get("reward/judged", record.get("reward"))


def spoken(key: str) -> str:
    """A held-out number's name in a sentence: gold accuracy, or question 'correct' by qwen."""
    if key == GOLD:
        return "gold accuracy"
    parts = key.split("/")  # an evaluator's name may hold a slash, too
    return f"question {parts[-2]!r} by {'/'.join(parts[1:-2])}" if parts[0] == "judge" else key


def best_metric(heldout: Mapping[str, float]) -> str | None:
    """What the best checkpoint is chosen by: gold accuracy, else a held-out evaluator, else nothing."""
    return GOLD if GOLD in heldout else min(heldout, default=None)


def best_step(measured: Mapping[int, float]) -> int | None:
    """The step with the highest held-out value (the earliest of equals); None when nothing was measured."""
    return max(sorted(measured), key=lambda step: measured[step], default=None)

"""Models against each other: win rates in both presentation orders, with lengths taken out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from rlme.align.judge import Comparison, PairwiseJudge, choice, mean_of_orders
from rlme.align.prompts import AlignPrompt
from rlme.align.ranking import instruction_text
from rlme.judgebench import metrics as m

Job = tuple[int, str, str]
"""A match to be played: the prompt's index, and the names of two models."""


@dataclass(frozen=True, slots=True)
class Match:
    """One prompt's comparison of two models' answers: p(answer of `a` better) in each order."""

    prompt: int
    a: str
    b: str
    given: float | None
    swapped: float | None
    lengths: tuple[int, int]
    failures: dict[str, int] = field(default_factory=dict)
    same: bool = False
    """The answers are equal, which no judge was asked about."""

    @property
    def p(self) -> float | None:
        """The mean of both orders."""
        return mean_of_orders(self.given, self.swapped)


def comparisons(
    jobs: Sequence[Job], answers: Sequence[dict[str, str]], prompts: Sequence[AlignPrompt]
) -> list[Comparison]:
    """What a judge is asked for these matches: nothing where the answers are equal."""
    return [
        Comparison(instruction_text(prompts[i].prompt), answers[i][a], answers[i][b], prompts[i].references)
        for i, a, b in jobs
        if answers[i][a] != answers[i][b]
    ]


def play(
    jobs: Sequence[Job], answers: Sequence[dict[str, str]], prompts: Sequence[AlignPrompt], judge: PairwiseJudge
) -> list[Match]:
    """Play the matches in both orders; equal answers are a tie without a call."""
    verdicts = iter(judge.judge(comparisons(jobs, answers, prompts)))
    matches = []
    for i, a, b in jobs:
        x, y = answers[i][a], answers[i][b]
        lengths = len(x), len(y)
        if x == y:
            matches.append(Match(i, a, b, 0.5, 0.5, lengths, same=True))
        else:
            verdict = next(verdicts)
            matches.append(Match(i, a, b, verdict.given, verdict.swapped, lengths, dict(verdict.failures)))
    return matches


def table(matches: Sequence[Match], names: Sequence[str], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """One row per two models: how often the later one wins against the earlier one.

    `win_rate`: share of verdicts of the averaged orders, ties half. `soft`: mean probability. `length_controlled`: the
    win rate that a logistic model of the verdict expects at equal length (log ratio of characters as its only input,
    after the idea of length-controlled AlpacaEval). `equal`: same verdict in both orders, where the answers differ.
    """
    rows = []
    for a, b in combinations(names, 2):
        chosen = [x for x in matches if (x.a, x.b) == (a, b)]
        judged = [x for x in chosen if x.p is not None]
        row: dict[str, Any] = {"model": b, "against": a, "prompts": len(chosen), "judged": len(judged)}
        if judged:
            p = 1 - np.array([x.p for x in judged], dtype=np.float64)
            longer = np.log(np.array([(x.lengths[1] + 1) / (x.lengths[0] + 1) for x in judged]))
            weights = m.bootstrap_weights([str(x.prompt) for x in judged], resamples, seed)
            equal = np.array([float(choice(x.given) == choice(x.swapped)) for x in judged])
            differ = np.array([float(not x.same) for x in judged])
            won = m.correctness(p, np.ones_like(p))
            row |= {
                "win_rate": m.estimate(m.mean(won, weights)).json(),
                "soft": m.estimate(m.mean(p, weights)).json(),
                "length_controlled": m.estimate(_at_equal_length(won, longer, weights)).json(),
                "equal": m.estimate(m.mean(equal, weights, differ)).json(),
                "chars": [float(np.mean([x.lengths[k] for x in judged])) for k in (1, 0)],
            }
        rows.append(row)
    return rows


def _at_equal_length(won_N: m.Array, log_ratio_N: m.Array, weights_RN: m.Array) -> m.Array:
    """P(win) at a log length ratio of 0, under each row of weights; ties count as half a win and half a loss."""
    inputs = np.tanh(log_ratio_N)[:, None]
    if np.ptp(inputs) < 1e-9:
        return m.mean(won_N, weights_RN)
    both, target = np.concatenate([inputs, inputs]), np.repeat([1, 0], len(won_N))
    found = np.empty(len(weights_RN))
    for r, weights in enumerate(weights_RN):
        w = np.concatenate([weights * won_N, weights * (1 - won_N)])
        kept = w > 0
        if len(set(target[kept])) < 2:
            found[r] = target[kept][0]
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(C=10.0).fit(both[kept], target[kept], sample_weight=w[kept])
        found[r] = 1 / (1 + np.exp(-model.intercept_[0]))
    return found


def columns() -> list[str]:
    """The names of the table's columns."""
    return [
        "model",
        "against",
        "judged",
        "win rate %",
        "at equal length %",
        "mean probability",
        "same verdict in both orders %",
        "characters",
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table as text."""
    found = [row["model"], row["against"], f"{row['judged']} of {row['prompts']}"]
    if "win_rate" not in row:
        return [*found, *[""] * 5]
    rates = [_cell(row["win_rate"], 100), _cell(row["length_controlled"], 100), _cell(row["soft"], 1, 3)]
    return [*found, *rates, _cell(row["equal"], 100), f"{row['chars'][0]:.0f} / {row['chars'][1]:.0f}"]


def markdown(rows: Sequence[dict[str, Any]], judge: str) -> str:
    """The table for `report.md`."""
    lines = [
        f"# Win rates\n\nJudged by {judge}, both presentation orders; ties count half; 95 % bootstrap intervals over "
        "prompts.\n",
        "| " + " | ".join(columns()) + " |",
        "|" + "---|" * len(columns()),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float | None], scale: float, digits: int = 1) -> str:
    middle, low, high = (value[k] for k in ("value", "low", "high"))
    if middle is None:
        return ""
    text = f"{scale * middle:.{digits}f}"
    return text if low is None or high is None else f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"

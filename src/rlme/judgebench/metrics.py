"""Judge metrics with bootstrap intervals, and paired tests between protocols.

Everything is computed under a matrix of item weights `weights_RN`: its first row is all ones (the estimate
itself), the others are bootstrap resamples. Items of one cluster (answers to the same prompt) are drawn
together, because they are not independent. `p` is always p(output 1 is better) or p(answer is right), `y` the
label as 1.0 or 0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata
from sklearn.metrics import cohen_kappa_score, roc_auc_score

Array = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % percentile bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float | None]:
        """The three numbers, None for NaN."""
        return {k: None if np.isnan(v := getattr(self, k)) else v for k in ("value", "low", "high")}


def bootstrap_weights(clusters: Sequence[str], resamples: int, seed: int) -> Array:
    """weights_RN: row 0 ones, then `resamples` rows of how often each item was drawn with its cluster."""
    place = {cluster: i for i, cluster in enumerate(sorted(set(clusters)))}  # in one order: so are the draws
    member, n = np.array([place[cluster] for cluster in clusters]), len(place)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, len(member))), draws[:, member]]).astype(np.float64)


def estimate(values_R: Array) -> Estimate:
    """From the statistic under each row of weights."""
    rest = values_R[1:][~np.isnan(values_R[1:])]
    low, high = np.percentile(rest, [2.5, 97.5]) if len(rest) else (np.nan, np.nan)
    return Estimate(float(values_R[0]), float(low), float(high))


def mean(values_N: Array, weights_RN: Array, among_N: Array | None = None) -> Array:
    """Weighted mean, among the items marked 1 in `among_N`; NaN where there are none."""
    among_N = np.ones(len(values_N)) if among_N is None else among_N
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(weights_RN @ (values_N * among_N) / (weights_RN @ among_N))


def correctness(p_N: Array, y_N: Array) -> Array:
    """1 where the preferred side is the labelled one, 0 where not, 1/2 for an exact tie."""
    return np.where(p_N == 0.5, 0.5, ((p_N > 0.5) == (y_N > 0.5)).astype(np.float64))


def auroc(p_N: Array, y_N: Array, weights_RN: Array) -> Array:
    """Area under the ROC curve under each row of weights; NaN where only one label is present."""
    found = np.full(len(weights_RN), np.nan)
    for r, weights in enumerate(weights_RN):
        drawn = weights > 0
        if 0 < y_N[drawn].sum() < drawn.sum():
            found[r] = roc_auc_score(y_N[drawn], p_N[drawn], sample_weight=weights[drawn])
    return found


def brier(p_N: Array, y_N: Array, weights_RN: Array) -> Array:
    """Mean squared difference of probability and label (sklearn's brier_score_loss)."""
    return mean((p_N - y_N) ** 2, weights_RN)


def bin_of(p_N: Array) -> NDArray[np.int64]:
    """Which of BINS equal bins of [0, 1] a probability falls in."""
    return np.minimum((p_N * BINS).astype(np.int64), BINS - 1)


def ece(p_N: Array, y_N: Array, weights_RN: Array) -> Array:
    """Expected calibration error: mean over items of |mean label - mean probability| of their bin."""
    in_bin_NB = np.eye(BINS)[bin_of(p_N)]
    gaps_RB = np.abs((weights_RN * (y_N - p_N)) @ in_bin_NB)
    return np.asarray(gaps_RB.sum(1) / weights_RN.sum(1))


def reliability(p_N: Array, y_N: Array) -> list[dict[str, float]]:
    """The reliability plot's points: per non-empty bin, how many items, their mean probability, their share
    of y = 1.
    """
    bins = bin_of(p_N)
    return [
        {
            "n": int((bins == b).sum()),
            "p": float(p_N[bins == b].mean()),
            "share": float(y_N[bins == b].mean()),
        }
        for b in range(BINS)
        if (bins == b).any()
    ]


def pair_length_bias(p_N: Array, y_N: Array, longer_N: Array, weights_RN: Array) -> Array:
    """How much more often than not the longer output is preferred when quality does not favour it, in [-1/2,
    1/2].

    The share of verdicts for the longer output, averaged with equal weight over the items where the longer
    output is the better one and those where it is the worse one, minus 1/2. `longer_N`: 1, 2, or 0 for equal
    lengths.
    """
    picks_first = np.where(p_N == 0.5, 0.5, (p_N > 0.5).astype(np.float64))
    picks_longer = np.where(longer_N == 1, picks_first, 1 - picks_first)
    better_is_longer = (longer_N == np.where(y_N > 0.5, 1, 2)).astype(np.float64)
    differ = (longer_N > 0).astype(np.float64)
    favoured = mean(picks_longer, weights_RN, better_is_longer * differ)
    not_favoured = mean(picks_longer, weights_RN, (1 - better_is_longer) * differ)
    return np.asarray((favoured + not_favoured) / 2 - 0.5)


def point_length_bias(p_N: Array, y_N: Array, length_N: Array, weights_RN: Array) -> Array:
    """Rank correlation of probability and answer length among answers of equal correctness (mean of right and
    wrong).
    """
    both = []
    for label in (0.0, 1.0):
        chosen = y_N == label
        if chosen.sum() < 3:
            continue
        x, z, w = rankdata(p_N[chosen]), rankdata(length_N[chosen]), weights_RN[:, chosen]
        with np.errstate(invalid="ignore", divide="ignore"):
            w = w / w.sum(1, keepdims=True)
            mx, mz = w @ x, w @ z
            covariance = w @ (x * z) - mx * mz
            spread = np.sqrt((w @ x**2 - mx**2) * (w @ z**2 - mz**2))
            both.append(np.where(spread > 1e-12, covariance / np.where(spread > 1e-12, spread, 1), np.nan))
    return np.asarray(np.mean(both, axis=0)) if both else np.full(len(weights_RN), np.nan)


def within_cluster_auroc(p_N: Array, y_N: Array, clusters: Sequence[str], weights_RN: Array) -> Array:
    """Share of (right, wrong) pairs of answers to the same prompt that the judge puts in order; ties count
    half.

    This is what a group-relative reward lives on: differences between prompts cancel in it.
    """
    groups: dict[str, list[int]] = {}
    for i, cluster in enumerate(clusters):
        groups.setdefault(cluster, []).append(i)
    won, pairs, drawn = [], [], []
    for members in groups.values():
        right = p_N[[i for i in members if y_N[i] > 0.5]]
        wrong = p_N[[i for i in members if y_N[i] <= 0.5]]
        difference = right[:, None] - wrong[None, :]
        won.append(float((difference > 0).sum() + 0.5 * (difference == 0).sum()))
        pairs.append(float(difference.size))
        drawn.append(weights_RN[:, members[0]])  # a cluster's items are drawn together
    drawn_RC = np.stack(drawn, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(drawn_RC @ np.array(won) / (drawn_RC @ np.array(pairs)))


def kappa(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Cohen's kappa of two raters; NaN when both always say the same one thing."""
    if len(set(a) | set(b)) < 2:
        return float("nan")
    return float(cohen_kappa_score(list(a), list(b)))


def mcnemar(correct_a: Array, correct_b: Array) -> tuple[int, int, float]:
    """(only a right, only b right, exact two-sided p) of two judges on the same items; ties are left out."""
    only_a = int(((correct_a == 1) & (correct_b == 0)).sum())
    only_b = int(((correct_a == 0) & (correct_b == 1)).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return only_a, only_b, float(p)


def bootstrap_p(differences_R: Array) -> float:
    """Two-sided p of a paired bootstrap: how often the difference falls on either side of 0, with 1 added to
    both.
    """
    rest = differences_R[1:]
    below, above = (rest <= 0).sum() + 1, (rest >= 0).sum() + 1
    return float(min(1.0, 2 * min(below, above) / (len(rest) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for several tests."""
    order = np.argsort(p_values)
    adjusted, highest = np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return [float(p) for p in adjusted]

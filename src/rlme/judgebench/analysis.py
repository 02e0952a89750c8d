"""From runs to a table: the metrics of each run, paired tests, agreement, the manipulation check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from rlme.align.judge import choice
from rlme.judgebench import metrics as m
from rlme.judgebench.llmbar import llmbar_statistics
from rlme.judgebench.run import Record, Run, choices, failures

RESAMPLES = 1000
ALL = "all pairs"
"""Name of the sets of pairs taken together."""


def analyse(runs: Sequence[Run], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Everything the report shows, as plain JSON-ready data (NaN is None)."""
    runs = [*runs, *pooled(runs)]
    shown = [run for run in runs if run.shown == "given"]
    return {
        "runs": [summary(run, resamples=resamples, seed=seed) for run in shown],
        "tests": paired_tests(shown, resamples=resamples, seed=seed),
        "agreement": agreement(shown),
        "manipulation": manipulations(runs, resamples=resamples, seed=seed),
        "resamples": resamples,
        "seed": seed,
    }


def pooled(runs: Sequence[Run]) -> list[Run]:
    """The pairs of all sets together, for every judge with every protocol: small sets alone say little."""
    sets = list(dict.fromkeys(run.set for run in runs if run.pairwise and run.soft))
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.pairwise and run.soft:
            groups.setdefault((run.judge, run.protocol, run.shown), []).append(run)
    found = []
    for parts in groups.values() if len(sets) > 1 else ():
        records = tuple(
            # items keep one number in all runs, so that protocols can be compared on the same ones
            replace(r, item=sets.index(run.set) * 1_000_000 + r.item, cluster=f"{run.set}: {r.cluster}")
            for run in parts
            for r in run.records
        )
        counts = {name: sum(getattr(run, name) for run in parts) for name in ("unasked", "skipped")}
        seconds = sum(run.seconds or 0.0 for run in parts)
        found.append(replace(parts[0], set=ALL, records=records, seconds=seconds, inputs="", **counts))
    return found


def summary(run: Run, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The metrics of one run. Accuracies are over items judged in every order; failures are counted beside
    them.
    """
    judged = [r for r in run.records if r.judged]
    masses = [r.mass for r in run.records if r.mass is not None]
    out: dict[str, Any] = {
        "set": run.set,
        "judge": run.judge,
        "protocol": run.protocol,
        "kind": "pairs" if run.pairwise else "answers",
        "items": len(run.records),
        "judged": len(judged),
        "no_reference": run.unasked,
        "ties_in_file": run.skipped,
        "failures": dict(failures(run)),
        "shortened": sum(r.shortened for r in run.records),
        "mass": float(np.mean(masses)) if masses else None,
        "tokens_in": sum(r.tokens_in for r in run.records),
        "tokens_cached": sum(r.tokens_cached for r in run.records),
        "tokens_out": sum(r.tokens_out for r in run.records),
        "cost": sum(r.cost for r in run.records),
        "seconds": run.seconds,
    }
    if judged:
        weights = m.bootstrap_weights([r.cluster for r in judged], resamples, seed)
        values = _pair_metrics(run, judged, weights) if run.pairwise else _point_metrics(judged, weights)
        out["metrics"] = {name: m.estimate(v).json() for name, v in values.items()}
        if run.soft:
            out["reliability"] = m.reliability(_p(judged), _y(judged))
    if run.pairwise and not run.soft:
        made = choices(run)
        labels = [1 if r.label else 2 for r in run.records]
        first, second = ([made[r.item][k] for r in run.records] for k in (0, 1))
        statistics = llmbar_statistics(labels, first, second)
        out["llmbar"] = {k: v if isinstance(v, str) else _number(v) for k, v in statistics.items()}
    if run.pairwise and judged:
        labels = [1 if r.label else 2 for r in judged]
        both = [(choice(r.given), choice(r.swapped)) for r in judged]
        out["kappa"] = {
            "given": _number(m.kappa([a for a, _ in both], labels)),
            "swapped": _number(m.kappa([b for _, b in both], labels)),
            "orders": _number(m.kappa([a for a, _ in both], [b for _, b in both])),
        }
    return out


def _pair_metrics(run: Run, judged: Sequence[Record], weights_RN: m.Array) -> dict[str, m.Array]:
    y = _y(judged)
    given, swapped = _array([r.given for r in judged]), _array([r.swapped for r in judged])
    p = (given + swapped) / 2
    right_given, right_swapped = m.correctness(given, y), m.correctness(swapped, y)
    equal = _array([float(choice(a) == choice(b)) for a, b in zip(given, swapped, strict=True)])
    # p(what is shown first): in the given order output 1 stands first, in the swapped order output 2.
    first_given, first_swapped = (
        m.correctness(given, np.ones_like(y)),
        m.correctness(swapped, np.zeros_like(y)),
    )
    longer = _array([0 if a == b else 1 if a > b else 2 for a, b in (r.lengths for r in judged)])
    values = {
        "accuracy_given": m.mean(right_given, weights_RN),
        "accuracy_swapped": m.mean(right_swapped, weights_RN),
        "accuracy": m.mean((right_given + right_swapped) / 2, weights_RN),
        "accuracy_both": m.mean((right_given == 1) & (right_swapped == 1), weights_RN),
        "equal": m.mean(equal, weights_RN),
        "first_shown": m.mean((first_given + first_swapped) / 2, weights_RN),
        "always_first": m.mean((first_given == 1) & (first_swapped == 1), weights_RN),
        "always_second": m.mean((first_given == 0) & (first_swapped == 0), weights_RN),
        "length_bias": m.pair_length_bias(p, y, longer, weights_RN),
    }
    if run.soft:
        values |= {
            "accuracy_soft": m.mean(m.correctness(p, y), weights_RN),
            "auroc": m.auroc(p, y, weights_RN),
            "brier": m.brier(p, y, weights_RN),
            "ece": m.ece(p, y, weights_RN),
        }
    return values


def _point_metrics(judged: Sequence[Record], weights_RN: m.Array) -> dict[str, m.Array]:
    p, y = _p(judged), _y(judged)
    return {
        "accuracy": m.mean(m.correctness(p, y), weights_RN),
        "says_right": m.mean(m.correctness(p, np.ones_like(y)), weights_RN),
        "is_right": m.mean(y, weights_RN),
        "auroc": m.auroc(p, y, weights_RN),
        "auroc_within_prompt": m.within_cluster_auroc(p, y, [r.cluster for r in judged], weights_RN),
        "brier": m.brier(p, y, weights_RN),
        "ece": m.ece(p, y, weights_RN),
        "length_bias": m.point_length_bias(p, y, _array([r.lengths[0] for r in judged]), weights_RN),
    }


def paired_tests(runs: Sequence[Run], *, resamples: int = RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Between runs on the same set that differ in protocol or judge only: difference in accuracy on the same
    items.

    Two tests: a bootstrap of the paired difference (mean of both orders), and McNemar's exact test on the
    verdicts of the averaged orders. `p_holm` is the bootstrap's p adjusted for all tests of the table. Without
    resamples there is neither.
    """
    found: list[dict[str, Any]] = []
    for a, b in combinations(runs, 2):
        if a.set != b.set or a.pairwise != b.pairwise or (a.judge != b.judge and a.protocol != b.protocol):
            continue
        by_item = {r.item: r for r in b.records if r.judged}
        both = [(r, by_item[r.item]) for r in a.records if r.judged and r.item in by_item]
        if not both:
            continue
        weights = m.bootstrap_weights([r.cluster for r, _ in both], resamples, seed)
        of_a, of_b = (_accuracy([pair[k] for pair in both]) for k in (0, 1))
        difference = m.mean(of_b - of_a, weights)
        only_a, only_b, p_mcnemar = m.mcnemar(
            *(m.correctness(_p([pair[k] for pair in both]), _y([r for r, _ in both])) for k in (0, 1))
        )
        found.append(
            {
                "set": a.set,
                "a": {"judge": a.judge, "protocol": a.protocol},
                "b": {"judge": b.judge, "protocol": b.protocol},
                "items": len(both),
                "difference": m.estimate(difference).json(),
                "p_bootstrap": m.bootstrap_p(difference) if resamples else None,
                "only_a_right": only_a,
                "only_b_right": only_b,
                "p_mcnemar": p_mcnemar,
            }
        )
    adjusted = m.holm([t["p_bootstrap"] for t in found]) if found and resamples else [None] * len(found)
    for test, p_holm in zip(found, adjusted, strict=True):
        test["p_holm"] = p_holm
    return found


def agreement(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Between judges asked with the same protocol on the same set: share of equal verdicts, and Cohen's
    kappa.
    """
    found = []
    for a, b in combinations(runs, 2):
        if a.set != b.set or a.protocol != b.protocol or a.judge == b.judge:
            continue
        of_b = {r.item: choice(r.p) for r in b.records if r.judged}
        both = [(choice(r.p), of_b[r.item]) for r in a.records if r.judged and r.item in of_b]
        if both:
            found.append(
                {
                    "set": a.set,
                    "protocol": a.protocol,
                    "judges": [a.judge, b.judge],
                    "items": len(both),
                    "agreement": sum(x == y for x, y in both) / len(both),
                    "kappa": _number(m.kappa([x for x, _ in both], [y for _, y in both])),
                }
            )
    return found


def manipulations(runs: Sequence[Run], *, resamples: int = RESAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """With a wrong reference shown: how many verdicts move, how many of those to the worse output, what
    accuracy is left.

    A judge that reads the reference has to move. One whose verdicts stay does not use it, whatever its
    accuracy.
    """
    found = []
    normal = {run.key(): run for run in runs if run.shown == "given"}
    for wrong in (run for run in runs if run.shown != "given"):
        by_item = {r.item: r for r in normal[wrong.key()].records if r.judged}
        both = [(by_item[r.item], r) for r in wrong.records if r.judged and r.item in by_item]
        if not both:
            continue
        weights = m.bootstrap_weights([r.cluster for r, _ in both], resamples, seed)
        before, after = (_p([pair[k] for pair in both]) for k in (0, 1))
        y = _y([r for r, _ in both])
        right_before, right_after = m.correctness(before, y), m.correctness(after, y)
        moved = (right_before != right_after).astype(np.float64)
        # by how much p(better output) changes
        shift = np.where(y > 0.5, after - before, before - after)
        values = {
            "moved": m.mean(moved, weights),
            "moved_to_worse": m.mean((right_after < right_before).astype(np.float64), weights, moved),
            "shift": m.mean(shift, weights),
            "accuracy_before": m.mean(right_before, weights),
            "accuracy_after": m.mean(right_after, weights),
        }
        found.append(
            {
                "set": wrong.set,
                "judge": wrong.judge,
                "protocol": wrong.protocol,
                "reference": wrong.shown,
                "items": len(both),
                "metrics": {name: m.estimate(v).json() for name, v in values.items()},
            }
        )
    return found


def _accuracy(records: Sequence[Record]) -> m.Array:
    y = _y(records)
    given = m.correctness(_array([r.given for r in records]), y)
    if len(records[0].lengths) == 1:
        return given
    return (given + m.correctness(_array([r.swapped for r in records]), y)) / 2


def _p(records: Sequence[Record]) -> m.Array:
    return _array([r.p for r in records])


def _y(records: Sequence[Record]) -> m.Array:
    return _array([float(r.label) for r in records])


def _array(values: Sequence[float | int | None]) -> m.Array:
    return np.asarray(values, dtype=np.float64)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value

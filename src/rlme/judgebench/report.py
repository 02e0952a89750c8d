"""The benchmark's report: Markdown for a repository, and one HTML page with reliability plots and no
network.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

_KEY = ["set", "judge", "protocol"]
_PAIR_COLUMNS = {
    "accuracy": "accuracy (mean of both orders)",
    "accuracy_given": "as given",
    "accuracy_swapped": "swapped",
    "accuracy_both": "right in both",
    "accuracy_soft": "averaged probability",
}
_BIAS_COLUMNS = {
    "equal": "same verdict in both orders",
    "first_shown": "prefers what is shown first",
    "always_first": "first both times",
    "always_second": "second both times",
    "length_bias": "length bias",
}
_CALIBRATION_COLUMNS = {"auroc": "AUROC", "brier": "Brier", "ece": "ECE"}
_POINT_COLUMNS = {
    "accuracy": "accuracy",
    "says_right": "says right",
    "is_right": "is right",
    "auroc": "AUROC",
    "auroc_within_prompt": "AUROC within a prompt",
    "brier": "Brier",
    "ece": "ECE",
    "length_bias": "length bias",
}
_FRACTIONS = ("length_bias", "auroc", "auroc_within_prompt", "brier", "ece", "shift")
"""Shown as they are; every other metric is a share, shown in per cent."""

NOTES = """\
Shares are in per cent, with 95 % percentile bootstrap intervals over prompts. Accuracies are over items judged in \
both orders; failed judgements are counted, never scored. *Prefers what is shown first* is 50 % for a judge without \
position bias. *Length bias* of pairs: share of verdicts for the longer output, averaged over the items where it is \
better and those where it is worse, minus one half (0: none); of single answers: rank correlation of probability and \
length among answers of equal correctness. *Label mass* is the probability of all labels together: far below 1, the \
judge wants to say something else. ECE uses ten equal bins."""

Table = tuple[str, list[str], list[list[str]]]
"""Title, column names, rows."""


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of an analysis, as text."""
    runs = result["runs"]
    pairs = [r for r in runs if r["kind"] == "pairs" and "metrics" in r]
    points = [r for r in runs if r["kind"] == "answers" and "metrics" in r]
    soft = [r for r in pairs if "auroc" in r["metrics"]]
    found = [
        _overview(soft),
        _metric_table("Pairs: accuracy", pairs, _PAIR_COLUMNS),
        _metric_table("Pairs: position and length", pairs, _BIAS_COLUMNS),
        _metric_table("Pairs: probabilities", soft, _CALIBRATION_COLUMNS),
        _metric_table("Single answers", points, _POINT_COLUMNS),
        _counts(runs),
        _manipulation(result["manipulation"]),
        _tests(result["tests"]),
        _agreement(result["agreement"]),
        _kappas(runs),
        _llmbar(runs),
    ]
    return [table for table in found if table[2]]


def _overview(runs: Sequence[dict[str, Any]]) -> Table:
    """One row a judge and protocol, one column a set."""
    sets = list(dict.fromkeys(r["set"] for r in runs))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for r in runs:
        shown = f"{_estimate(r['metrics'], 'accuracy_soft')} of {r['judged']}"
        cells.setdefault((r["judge"], r["protocol"]), {})[r["set"]] = shown
    rows = [[*key, *(found.get(name, "") for name in sets)] for key, found in cells.items()]
    title = "Overview: right by the averaged probability of both orders"
    return title, ["judge", "protocol", *sets], rows if len(sets) > 1 else []


def _counts(runs: Sequence[dict[str, Any]]) -> Table:
    columns = ["items", "judged", "no reference", "failures", "shortened", "label mass"]
    rows = []
    for r in runs:
        counts = [str(r["items"]), str(r["judged"]), str(r["no_reference"]), _failures(r["failures"])]
        cost = [f"{r['cost']:.4f}" if r["cost"] else "", _number(r["seconds"], 1)]
        tokens = [str(r["tokens_in"]), str(r["tokens_out"])]
        rows.append([*_key(r), *counts, str(r["shortened"]), _number(r["mass"]), *tokens, *cost])
    return "Counts and cost", [*_KEY, *columns, "tokens in", "tokens out", "cost", "seconds"], rows


def _manipulation(checks: Sequence[dict[str, Any]]) -> Table:
    columns = ["reference shown", "items", "verdicts that move", "of these, to the worse output"]
    shown = {"other": "another item's", "worse": "the worse output"}
    keys = ("moved", "moved_to_worse", "shift", "accuracy_before", "accuracy_after")
    rows = [
        [*_key(r), shown[r["reference"]], str(r["items"]), *(_estimate(r["metrics"], k) for k in keys)] for r in checks
    ]
    columns += ["change of p(better)", "accuracy before", "after"]
    return "With a wrong reference", [*_KEY, *columns], rows


def _tests(tests: Sequence[dict[str, Any]]) -> Table:
    columns = ["set", "A", "B", "items", "difference", "p (bootstrap)", "p (Holm)"]
    rows = []
    for t in tests:
        difference = _estimate(t, "difference")
        p = [_p_value(t["p_bootstrap"]), _p_value(t["p_holm"])]
        mcnemar = [str(t["only_a_right"]), str(t["only_b_right"]), _p_value(t["p_mcnemar"])]
        rows.append([t["set"], _side(t["a"]), _side(t["b"]), str(t["items"]), difference, *p, *mcnemar])
    measures = "difference: B minus A, mean of both orders; only A or B right: averaged probability"
    columns += ["only A right", "only B right", "p (McNemar)"]
    return f"Paired tests of accuracy ({measures})", columns, rows


def _agreement(found: Sequence[dict[str, Any]]) -> Table:
    columns = ["set", "protocol", "judges", "items", "equal verdicts", "Cohen's kappa"]
    rows = []
    for t in found:
        share = f"{100 * t['agreement']:.1f} %"
        judges = " / ".join(t["judges"])
        rows.append([t["set"], t["protocol"], judges, str(t["items"]), share, _number(t["kappa"])])
    return "Agreement between judges", columns, rows


def _kappas(runs: Sequence[dict[str, Any]]) -> Table:
    orders = ("given", "swapped", "orders")
    rows = [[*_key(r), *(_number(r["kappa"][k]) for k in orders)] for r in runs if "kappa" in r]
    title = "Cohen's kappa with the labels, and between the orders"
    return title, [*_KEY, "as given", "swapped", "between orders"], rows


def _llmbar(runs: Sequence[dict[str, Any]]) -> Table:
    scored = [r for r in runs if "llmbar" in r]
    names = list(scored[0]["llmbar"]) if scored else []
    rows = [[r["set"], r["judge"], *("" if v is None else str(v) for v in r["llmbar"].values())] for r in scored]
    title = "By LLMBar's own definitions (its kappas compare differently coded sequences)"
    return title, ["set", "judge", *names], rows


def markdown(result: dict[str, Any], title: str = "Judge benchmark") -> str:
    """The report as Markdown."""
    parts = [f"# {title}\n\n{NOTES}\n"]
    for name, columns, rows in tables(result):
        lines = [_md_row(columns), _md_row(["---"] * len(columns)), *(_md_row(row) for row in rows)]
        parts.append(f"## {name}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def page(result: dict[str, Any], title: str = "Judge benchmark") -> str:
    """The report as one self-contained HTML page."""
    notes = html.escape(NOTES)
    for emphasised in ("Prefers what is shown first", "Length bias", "Label mass"):
        notes = notes.replace(f"*{emphasised}*", f"<em>{emphasised}</em>")
    parts = [f"<h1>{html.escape(title)}</h1><p>{notes}</p>"]
    for name, columns, rows in tables(result):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(name)}</h2><div class=wide><table><tr>{head}</tr>{body}</table></div>")
    plots = "".join(_reliability_plot(r) for r in result["runs"] if r.get("reliability"))
    if plots:
        parts.append(
            "<h2>Reliability</h2><p>Each dot is the items of one bin: mean probability across, share labelled "
            "so upwards, area by number of items. A calibrated judge lies on the line.</p>"
            f"<div class=plots>{plots}</div>"
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


_STYLE = """\
body{font:15px/1.45 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}
th{border-bottom:2px solid #888}.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}
figcaption{font-size:12px;max-width:15rem}"""


def _reliability_plot(run: dict[str, Any]) -> str:
    """Inline SVG, 240 by 240: share labelled so over mean probability, per bin."""
    size, margin = 200, 32
    largest = max(point["n"] for point in run["reliability"])

    def x(value: float) -> float:
        return round(margin + value * size, 1)

    def y(value: float) -> float:
        return round(8 + (1 - value) * size, 1)

    dots = "".join(
        f'<circle cx="{x(p["p"])}" cy="{y(p["share"])}" r="{round(2 + 7 * (p["n"] / largest) ** 0.5, 1)}" '
        f'fill="#2563eb" fill-opacity="0.6"><title>{p["n"]} items: p {p["p"]:.3f}, share {p["share"]:.3f}</title>'
        "</circle>"
        for p in run["reliability"]
    )
    ticks = "".join(
        f'<text x="{x(t)}" y="{y(0) + 14}" text-anchor="middle">{t:g}</text>'
        f'<text x="{margin - 5}" y="{y(t) + 3}" text-anchor="end">{t:g}</text>'
        for t in (0, 0.5, 1)
    )
    caption = html.escape(" / ".join(_key(run)))
    return (
        f'<figure><svg width="{size + margin + 12}" height="{size + 28}" font-size="10" role="img" '
        f'aria-label="Reliability of {caption}"><rect x="{margin}" y="8" width="{size}" height="{size}" fill="none" '
        f'stroke="#bbb"/><line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="#999" stroke-dasharray="4"/>'
        f"{dots}{ticks}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _metric_table(title: str, runs: Sequence[dict[str, Any]], columns: dict[str, str]) -> Table:
    shown = {k: name for k, name in columns.items() if any(k in r["metrics"] for r in runs)}
    rows = [[*_key(r), *(_estimate(r["metrics"], k) for k in shown)] for r in runs]
    return title, [*_KEY, *shown.values()], rows


def _key(run: dict[str, Any]) -> list[str]:
    return [run["set"], run["judge"], run["protocol"]]


def _side(side: dict[str, str]) -> str:
    return f"{side['judge']} / {side['protocol']}"


def _estimate(values: dict[str, Any], key: str) -> str:
    found = values.get(key)
    if found is None or found["value"] is None:
        return ""
    scale, digits = (1, 3) if key in _FRACTIONS else (100, 1)
    value, low, high = (
        None if found[k] is None else f"{scale * found[k]:.{digits}f}" for k in ("value", "low", "high")
    )
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _p_value(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _failures(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "0"


def _md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

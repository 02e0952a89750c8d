"""What there is to say about a run: curves, key numbers, findings in words, and where time and tokens went.

Plain data. The page draws it, the terminal prints it, and so both say the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from rlme.report.run import Run
from rlme.training.monitors import GOLD, best_step, spoken

WINDOW = 20
"""Steps that "now" and "at the start" are averaged over."""

FAILED, MASS, FLAT, CLIPPED, DISTINCT, AUROC = 0.01, 0.5, 0.5, 0.2, 0.4, 0.55
"""Beyond these a number becomes a finding (failed judgements, flat groups, clipped: above; the others: below)."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. `points`: measured only now and then, drawn with marks. `band`: (low, high) per step."""

    name: str
    steps: list[int]
    values: list[float]
    points: bool = False
    dashed: bool = False
    band: tuple[list[float], list[float]] | None = None
    group: int | None = None
    """Series of one group share a colour."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps. `share`: the values are shares or probabilities, drawn on [0, 1]."""

    title: str
    note: str
    series: list[Series]
    share: bool = False
    minor: bool = False
    """Belongs to the optimiser, not to the answers: shown last."""


@dataclass(frozen=True)
class Finding:
    """A sentence and how serious it is."""

    level: Literal["bad", "warn", "good", "info"]
    text: str


@dataclass(frozen=True)
class Tile:
    """A key number."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Spending:
    """Where a run's time, tokens and money went."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    per_second: dict[str, float] = field(default_factory=dict)
    cost: float | None = None
    peak_mb: float | None = None


def short(value: float) -> str:
    """Three significant digits, whole numbers from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float, *, rough: bool = False) -> str:
    """1 h 05 min, 3 min 20 s (`rough`: 3 min), 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if rough and minutes < 60:
        return f"{minutes} min"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_JUDGED = re.compile(r"(eval/)?judge/(.+)/([^/]+)/(?:score|probability|mass|bounded|failures/([^/]+))", re.DOTALL)
"""Metrics of judgements. An evaluator's name may be a model's (org/name), a question's has no slash."""


def judges(run: Run) -> list[tuple[str, str]]:
    """(evaluator, question) pairs that were asked, in order of appearance."""
    return list(dict.fromkeys((found[2], found[3]) for key in run.keys if (found := _JUDGED.fullmatch(key))))


def _series(run: Run, key: str, name: str, **style: bool | int) -> Iterable[Series]:
    steps, values = run.series(key)
    if values:
        yield Series(name, steps, values, **style)  # type: ignore[arg-type]


def _both(run: Run, key: str, name: str = "", group: int = 0, dashed: bool = False) -> list[Series]:
    """A metric on the training batches and on the held-out prompts, in one colour."""
    return [
        *_series(run, key, name or "training batch", group=group, dashed=dashed),
        *_series(run, f"eval/{key}", f"{name}, held-out" if name else "held-out prompts", group=group, points=True,
                 dashed=dashed),
    ]  # fmt: skip


def charts(run: Run) -> list[Chart]:
    """Every chart that has something to show."""
    asked = judges(run)
    questions = list(dict.fromkeys(question for _, question in asked))
    texts = run.section("questions")
    everything = [
        Chart(
            "Reward",
            "what is trained on: its rise alone proves nothing",
            [*_both(run, "reward"), *_both(run, "reward/judged", "judged part", group=1)],
        ),
        Chart("Gold accuracy", "known answers, never part of the reward", _both(run, GOLD), share=True),
    ]
    for question in questions:
        ask = texts.get(question, {}).get("ask", "") if isinstance(texts.get(question), dict) else ""
        lines = []
        for group, (evaluator, _) in enumerate(pair for pair in asked if pair[1] == question):
            held_out = run.weight(evaluator, question) == 0
            name = f"{evaluator} (weight 0)" if held_out else evaluator
            lines += _both(run, f"judge/{evaluator}/{question}/probability", name, group, dashed=held_out)
        everything.append(Chart(f"Question: {question}", ask or "mean probability of the target answer", lines, True))
    gold_keys = {
        "gold/within_group_auroc": "right above wrong, within a group",
        "gold/auroc": "right above wrong, whole batch",
        "gold/best_is_right": "best-rewarded answer is right",
        "gold/pointbiserial": "correlation within groups",
    }
    shape_keys = {
        "completions/distinct": "distinct in a group",
        "completions/repetition": "repeated 4-word sequences",
        "completions/addresses_evaluator": "address the evaluator",
        "completions/clipped": "cut off",
        "judge/agreement": "evaluators order alike",
    }
    mass: dict[str, list[str]] = {}
    for evaluator, question in asked:
        mass.setdefault(evaluator, []).append(f"judge/{evaluator}/{question}/mass")
    everything += [
        Chart(
            "Does the reward know what is right?",
            "0.5 is chance (0 for the correlation)",
            [s for i, (key, name) in enumerate(gold_keys.items()) for s in _series(run, key, name, group=i)],
            share=True,
        ),
        Chart("Length", "mean tokens of a completion", _both(run, "completions/mean_tokens")),
        Chart(
            "Shape of the answers",
            "shares; shown without an alarm",
            [s for i, (key, name) in enumerate(shape_keys.items()) for s in _series(run, key, name, group=i)],
            share=True,
        ),
        Chart("Entropy", "nats per token of the policy's choices", list(_series(run, "entropy", "entropy", group=0))),
        Chart(
            "Distance from the start",
            "KL between the starting model and now, nats per token",
            [
                *_series(run, "kl", "training batch", group=0),
                *_series(run, "eval/kl_to_start", "held-out prompts", group=0, points=True),
            ],
        ),
        Chart(
            "Label mass",
            "probability an evaluator puts on any of the labels",
            [s for i, (name, keys) in enumerate(mass.items()) for s in _mean(run, keys, name, i)],
            share=True,
        ),
        Chart(
            "Missing",
            "shares of completions without a reward, and of groups without a spread",
            [
                *_series(run, "reward_missing", "no reward", group=0),
                *_series(run, "frac_groups_flat", "flat groups", group=1),
            ],
            share=True,
        ),
    ]
    optimiser = {
        "grad_norm": "before clipping",
        "loss": "",
        "learning_rate": "",
        "time/step": "seconds of a step",
        "memory/peak_mb": "most memory so far, MiB",
    }
    for key, note in optimiser.items():
        lines = [series for series in _series(run, key, key, group=0) if len(set(series.values)) > 1]
        everything.append(Chart(key, note, lines, minor=True))
    return [chart for chart in everything if chart.series]


def _mean(run: Run, keys: list[str], name: str, group: int) -> Iterable[Series]:
    rows = [(r["step"], [r[k] for k in keys if k in r]) for r in run.training]
    known = [(step, fmean(values)) for step, values in rows if values]
    if known:
        yield Series(name, [step for step, _ in known], [value for _, value in known], group=group)


def start_and_now(run: Run, key: str) -> tuple[float, float] | None:
    """Means of the first and the last `WINDOW` values (fewer, but never overlapping, in a short run)."""
    values = run.series(key)[1]
    if not values:
        return None
    n = max(1, min(WINDOW, len(values) // 2))
    return fmean(values[:n]), fmean(values[-n:])


def best_heldout(run: Run) -> tuple[str, dict[int, float]] | None:
    """What the best checkpoint is chosen by, and its measurements: gold, else a held-out evaluator.

    Step 0 is left out when there are others: of the starting model there is no checkpoint.
    """
    keys = [f"eval/{GOLD}"]
    keys += sorted(f"eval/judge/{e}/{q}/probability" for e, q in judges(run) if run.watched(e, q))
    for key in keys:
        measured = dict(zip(*run.series(key), strict=True))
        if measured:
            return key.removeprefix("eval/"), {s: v for s, v in measured.items() if s > 0} or measured
    return None


def failures(run: Run) -> tuple[Counter[str], float]:
    """Failed judgements by kind, and their share of all that were asked for in training."""
    kinds: Counter[str] = Counter()
    for record in run.training:
        for key, value in record.items():
            found = _JUDGED.fullmatch(key)
            if found and not found[1] and found[4]:
                kinds[found[4]] += int(value)
    asked = run.completions * len(judges(run))
    return kinds, kinds.total() / asked if asked else 0.0


def tiles(run: Run) -> list[Tile]:
    """The key numbers."""
    planned = run.section("train").get("steps")
    result = [Tile("steps", f"{run.steps}", f"of {planned}" if planned else "")]
    for key, label in (("reward", "reward"), ("reward/judged", "reward, judged part"), (GOLD, "gold, training")):
        if pair := start_and_now(run, key):
            result.append(Tile(label, short(pair[1]), f"at the start {short(pair[0])}"))
    if best := best_heldout(run):
        key, measured = best
        step = best_step(measured)
        last = measured[max(measured)]
        if step is not None:
            label = f"{'gold' if key == GOLD else key.split('/')[-2]}, held-out"
            result.append(Tile(label, short(last), f"best {short(measured[step])} at step {step}"))
    if pair := start_and_now(run, "completions/mean_tokens"):
        result.append(Tile("answer tokens", short(pair[1]), f"at the start {short(pair[0])}"))
    if judges(run) and run.training:
        kinds, share = failures(run)
        result.append(Tile("failed judgements", f"{kinds.total():,}", f"{share:.1%} of all"))
    if (elapsed := spending(run).seconds) and run.training:
        total = sum(elapsed.values())
        step_seconds = run.series("time/step")[1]
        note = f"{fmean(step_seconds):.3g} s a step" if step_seconds else ""
        result.append(Tile("time", duration(total, rough=True), note))
    if (cost := spending(run).cost) is not None:
        result.append(Tile("cost", short(cost), "as priced in the configuration"))
    return result


def findings(run: Run) -> list[Finding]:
    """In words: what is wrong, what to look at, what is fine. Thresholds are the constants of this file."""
    said = [Finding("bad", f"At step {step}: {text}") for step, text in run.alarms]
    if not run.training:
        return said  # `missing` says that there is no step yet
    if best := best_heldout(run):
        key, measured = best
        step = best_step(measured)
        if step:  # of the starting model there is no checkpoint
            what = spoken(key)
            said.append(
                Finding(
                    "info",
                    f"Best checkpoint by {what} on held-out prompts: step {step} ({short(measured[step])}); "
                    f"the last measurement, at step {max(measured)}, is {short(measured[max(measured)])}.",
                )
            )
            before = dict(zip(*run.series(f"eval/{key}"), strict=True)).get(0)
            if before is not None and before > measured[step]:
                said.append(
                    Finding("warn", f"The starting model ({short(before)}) is better by {what} than every checkpoint.")
                )
    else:
        said.append(
            Finding(
                "warn",
                "Nothing independent of the reward is measured: without gold answers, an evaluator of weight 0 and "
                "held-out prompts (`data.eval`) a policy that games its evaluator cannot be told from one that learns.",
            )
        )

    def now(key: str) -> float | None:
        pair = start_and_now(run, key)
        return None if pair is None else pair[1]

    kinds, share = failures(run)
    if share > FAILED:
        worst = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
        said.append(Finding("warn", f"{share:.1%} of the judgements failed ({worst})."))
    for evaluator, question in judges(run):
        mass = now(f"judge/{evaluator}/{question}/mass")
        if mass is not None and mass < MASS:
            said.append(
                Finding(
                    "warn",
                    f"{evaluator} puts only {mass:.0%} on the labels of question {question!r}: it mostly wants to say "
                    "something else. Try another template or read-out (`rlme ask`).",
                )
            )
    rules = [
        ("gold/within_group_auroc", lambda v: v < AUROC, "Within a group, a right answer has the higher reward in only "
         "{:.0%} of the pairs with a wrong one: the reward hardly knows what is right."),
        ("frac_groups_flat", lambda v: v > FLAT, "In {:.0%} of the groups all answers have the same reward: nothing is "
         "learned from them."),
        ("completions/clipped", lambda v: v > CLIPPED, "{:.0%} of the completions are cut off at the length limit."),
        ("completions/distinct", lambda v: v < DISTINCT, "Only {:.0%} of the answers in a group differ: the policy has "
         "lost its variety."),
    ]  # fmt: skip
    for key, wrong, sentence in rules:
        value = now(key)
        if value is not None and wrong(value):
            said.append(Finding("warn", sentence.format(value)))
    pair = start_and_now(run, "completions/addresses_evaluator")
    if pair is not None and pair[1] > max(0.05, 2 * pair[0]):
        said.append(
            Finding("warn", f"{pair[1]:.0%} of the answers now address the evaluator (at the start {pair[0]:.0%}).")
        )
    if not any(f.level in ("bad", "warn") for f in said):
        said.append(Finding("good", "No alarm, and none of the usual signs of trouble."))
    return said


def spending(run: Run) -> Spending:
    """Totals over the run; stages as the trainer names them."""
    stages = ("sample", "judge", "update", "measure", "load", "other")
    seconds = {stage: total for stage in stages if (total := run.total(f"time/{stage}")) is not None}
    names = {
        "tokens/sampled": "sampled by the policy",
        "tokens/judged_in": "read by evaluators",
        "tokens/judged": "of these computed (the rest was shared)",
        "tokens/trained": "in the loss",
    }
    tokens = {name: total for key, name in names.items() if (total := run.total(key)) is not None}
    rates = {}
    for stage, key in (("sample", "tokens/sampled"), ("judge", "tokens/judged_in"), ("update", "tokens/trained")):
        total = run.total(key)
        if total is not None and seconds.get(stage):
            rates[stage] = total / seconds[stage]
    # An endpoint's account has the held-out prompts, too.
    accounts = [key for key in run.keys if key.startswith("endpoint/") and key.endswith("/cost")]
    paid = [cost for key in accounts or ["cost/step"] if (cost := run.total(key))]
    peak = run.series("memory/peak_mb")[1]
    return Spending(seconds, tokens, rates, math.fsum(paid) if paid else None, max(peak) if peak else None)

"""Pairwise judges: which of two outputs is better, as a probability read from the log-probabilities of two
labels.

One *reading* is one call: two outputs in one presentation order, with at most one reference, by one
evaluator. A *verdict* gathers the readings of one comparison. The probability is a softmax over the two
labels only, spelling variants of a label summed (arXiv 2602.16802, `score_a = exp(lp_a) / (exp(lp_a) +
exp(lp_b))`); the probability of both labels under the full vocabulary is kept beside it as the label mass. A
reading that could not be had is a failure with a kind, and the verdict it belongs to has no score: never one
half.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlme.align.protocols import Protocol
from rlme.control_tokens import harmless
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import Answer, Failure, Message, Request
from rlme.label_mass import LabelMass
from rlme.questions import log_sum_exp
from rlme.templating import render

Orders = Literal["both", "given"]
TIE = 1e-9
"""Scores that are nearer to each other are equal: rounding, which depends on the order of a sum, decides nothing."""
CUT_MARK = " [...]"
SHORTEST_TEXT = 80
"""Characters to which an output may be shortened before the comparison is refused instead."""
TEMPLATE_ROOM = 512
"""Tokens that a chat template may add at most, for the quick check that a prompt fits."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two outputs for one instruction, and the reference outputs a judge may be shown (one call for each)."""

    instruction: str
    first: str
    second: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """One call's result. `p_first` is p(the comparison's *first* output is better), whatever the presentation
    order.

    `logprobs` are those of the labels (a) and (b) as shown: with `swapped`, (a) is the second output.
    """

    evaluator: str
    swapped: bool
    reference: int | None
    p_first: float | None
    logprobs: tuple[float, float] | None = None
    mass: float | None = None
    failure: Failure | None = None
    detail: str = ""
    critique: str | None = None
    shortened: bool = False
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """All readings of one comparison and what they come to.

    `given` and `swapped` are p(first output better) in each presentation order, in [0, 1]: the mean over
    references (or the share of them that vote for it) and the weighted mean over evaluators. None: not asked,
    or a reading of it is missing.
    """

    readings: tuple[Reading, ...]
    given: float | None
    swapped: float | None
    orders: Orders

    @property
    def score(self) -> float | None:
        """p(first output better): the mean over the presentation orders asked; None if any of them is
        missing.
        """
        if self.orders == "given":
            return self.given
        return mean_of_orders(self.given, self.swapped)

    @property
    def failures(self) -> Counter[str]:
        """How many readings failed, by kind."""
        return Counter(r.failure.value for r in self.readings if r.failure is not None)

    @property
    def shortened(self) -> bool:
        """Whether a text had to be cut to fit the evaluator."""
        return any(r.shortened for r in self.readings)


def choice(p_first: float | None) -> int | None:
    """1 or 2, the output that a probability prefers; 0 for a tie; None for a missing one."""
    if p_first is None:
        return None
    return 0 if abs(p_first - 0.5) < TIE else 1 if p_first > 0.5 else 2


def mean_of_orders(given: float | None, swapped: float | None) -> float | None:
    """Of both presentation orders, exactly one half for a tie; None if one is missing."""
    if given is None or swapped is None:
        return None
    mean = (given + swapped) / 2
    return mean if choice(mean) else 0.5


class PairwiseJudge:
    """One protocol asked of one or several evaluators.

    Args:
        evaluators: who is asked; several form an ensemble.
        protocol: what they are told.
        weights: one positive weight per evaluator (default: equal); they are normalised.
        vote: with several references, let each cast one vote instead of averaging the probabilities.
        max_tokens: longest prompt in tokens (None: whatever the evaluator accepts; it refuses longer ones
            itself).
        too_long: `shorten` cuts the outputs and the reference at their end, all to the same number of
            characters and
            never below SHORTEST_TEXT, marks the cut, and keeps instruction, rules and question whole;
            `refuse` makes the reading a CONTEXT_TOO_LONG failure. An evaluator that cannot count its tokens
            is sent the whole prompt.
        critique_tokens: longest reasoning of a protocol that reasons first.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator],
        protocol: Protocol,
        *,
        weights: Sequence[float] | None = None,
        vote: bool = False,
        max_tokens: int | None = None,
        too_long: Literal["shorten", "refuse"] = "shorten",
        critique_tokens: int = 256,
    ) -> None:
        if not evaluators:
            raise InputError("a pairwise judge needs at least one evaluator.")
        raw = list(weights) if weights is not None else [1.0] * len(evaluators)
        if len(raw) != len(evaluators) or min(raw) <= 0:
            raise InputError(
                f"judge weights {raw}: expected one positive number for each of {len(evaluators)} evaluators."
            )
        self.evaluators = list(evaluators)
        self.weights = [w / sum(raw) for w in raw]
        self.protocol = protocol
        self.vote = vote
        self.max_tokens = max_tokens
        self.too_long = too_long
        self.critique_tokens = critique_tokens
        self.label_mass = LabelMass("protocol")
        self._labels = [_kept_spellings(evaluator, protocol) for evaluator in self.evaluators]

    def calls(self, comparisons: Sequence[Comparison], *, orders: Orders = "both") -> int:
        """How many calls `judge` will make (a reasoning protocol writes once more for each)."""
        shown = sum(len(self._shown(c)) for c in comparisons)
        return shown * (2 if orders == "both" else 1) * len(self.evaluators)

    def judge(self, comparisons: Sequence[Comparison], *, orders: Orders = "both") -> list[Verdict]:
        """One verdict per comparison.

        Raises:
            InputError: a comparison without a (non-empty) reference under a protocol that shows one.
        """
        for row, comparison in enumerate(comparisons):
            if self.protocol.needs_reference and not any(r.strip() for r in comparison.references):
                raise InputError(
                    f"protocol {self.protocol.name!r} shows the judge a reference output, "
                    f"but comparison {row} has none (instruction {_short(comparison.instruction)})."
                )
        readings: list[list[list[Reading]]] = [[] for _ in comparisons]  # [comparison][evaluator][reading]
        for evaluator, labels in zip(self.evaluators, self._labels, strict=True):
            for row, found in enumerate(self._ask(evaluator, labels, comparisons, orders)):
                readings[row].append(found)
                for reading in found:
                    self.label_mass.add(evaluator.name, self.protocol.name, reading.mass)
        return [self._verdict(found, orders) for found in readings]

    def _ask(
        self,
        evaluator: Evaluator,
        labels: tuple[tuple[str, ...], tuple[str, ...]],
        comparisons: Sequence[Comparison],
        orders: Orders,
    ) -> list[list[Reading]]:
        spellings = (*labels[0], *labels[1])
        requests: list[Request] = []
        empty: list[Reading] = []  # what is known of a reading before it is asked
        owner: list[int] = []
        for row, comparison in enumerate(comparisons):
            for index in self._shown(comparison):
                texts, shortened, refused = self._fit(evaluator, comparison, index)
                for swapped in (False, True) if orders == "both" else (False,):
                    reading = Reading(evaluator.name, swapped, index, None, shortened=shortened)
                    if refused is not None:
                        reading = replace(reading, failure=Failure.CONTEXT_TOO_LONG, detail=refused)
                    empty.append(reading)
                    owner.append(row)
                    instruction = comparison.instruction
                    requests.append(self._request(evaluator, instruction, texts, swapped, spellings))
        out: list[list[Reading]] = [[] for _ in comparisons]
        asked = [i for i, reading in enumerate(empty) if reading.failure is None]
        critiques: dict[int, str] = {}
        if self.protocol.reason:
            asked = self._write_critiques(evaluator, asked, requests, empty, critiques)
        answers = evaluator.logprobs([requests[i] for i in asked])
        for i, answer in zip(asked, answers, strict=True):
            empty[i] = replace(_read(empty[i], answer, len(labels[0])), critique=critiques.get(i))
        for row, reading in zip(owner, empty, strict=True):
            out[row].append(reading)
        return out

    def _shown(self, comparison: Comparison) -> list[int] | list[None]:
        """The references asked with, one call for each."""
        if not self.protocol.needs_reference:
            return [None]
        return [i for i, reference in enumerate(comparison.references) if reference.strip()]

    def _write_critiques(
        self,
        evaluator: Evaluator,
        asked: list[int],
        requests: list[Request],
        empty: list[Reading],
        critiques: dict[int, str],
    ) -> list[int]:
        """Let the judge reason, and put its reasoning before the verdict; returns what is left to ask."""
        written = evaluator.write(
            [replace(requests[i], prefill="") if evaluator.chat else requests[i] for i in asked],
            max_tokens=self.critique_tokens,
        )
        left: list[int] = []
        cue = self.protocol.verdict_cue
        for i, text in zip(asked, written, strict=True):
            if isinstance(text, Failure):
                empty[i] = replace(empty[i], failure=text, detail="while writing its reasons")
                continue
            # A conclusion it wrote already is cut off: the verdict is read from the label, not from text.
            critiques[i] = text.split(cue.strip())[0].strip()
            reasoned = f"{critiques[i]}\n\n{cue}{self.protocol.prefill}".lstrip()
            request = requests[i]
            requests[i] = (
                replace(request, context=f"{request.context}{reasoned}")
                if isinstance(request.context, str)
                else replace(request, prefill=reasoned)
            )
            left.append(i)
        return left

    def _request(
        self,
        evaluator: Evaluator,
        instruction: str,
        texts: tuple[str, str, str],
        swapped: bool,
        spellings: tuple[str, ...],
    ) -> Request:
        first, second, reference = texts
        variables = {
            "instruction": instruction,
            "reference": reference,
            "output_a": second if swapped else first,
            "output_b": first if swapped else second,
        }
        where = f"protocol {self.protocol.name!r}"
        prompt = harmless(render(self.protocol.template, variables, where=where), evaluator)
        if evaluator.chat:
            # Everything in one user turn: several chat templates refuse a system turn.
            return Request((Message(role="user", content=prompt),), spellings, prefill=self.protocol.prefill)
        start = "\n\n" if self.protocol.reason else f"\n\nAnswer: {self.protocol.prefill}"
        return Request(f"{prompt}{start}", spellings)

    def _fit(
        self, evaluator: Evaluator, comparison: Comparison, index: int | None
    ) -> tuple[tuple[str, str, str], bool, str | None]:
        """(first, second, reference) as shown, whether they were cut, and why they are refused, if they
        are.
        """
        reference = comparison.references[index] if index is not None else ""
        texts = (comparison.first, comparison.second, reference)
        if self.max_tokens is None:
            return texts, False, None
        room = self.max_tokens - (self.critique_tokens if self.protocol.reason else 0)

        # A token is at least a byte: most prompts fit for certain, without a count (with an endpoint, a call each).
        parts = (self.protocol.template, comparison.instruction, *texts)
        if sum(len(text.encode()) for text in parts) + TEMPLATE_ROOM <= room:
            return texts, False, None

        def needed(shown: tuple[str, str, str]) -> int | None:
            counts: list[int] = []
            for swapped in (False, True):
                request = self._request(evaluator, comparison.instruction, shown, swapped, ())
                count = evaluator.count_tokens(request.context)
                if count is None:
                    return None
                counts.append(count)
            return max(counts)

        whole = needed(texts)
        if whole is None or whole <= room:
            return texts, False, None
        if self.too_long == "refuse":
            return texts, False, f"the prompt has {whole} tokens, more than {room}"
        # Binary search for the largest number of characters kept of each text.
        fits, too_much = 0, max(map(len, texts))
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            count = needed(_cut(texts, middle))
            fits, too_much = (middle, too_much) if count is not None and count <= room else (fits, middle)
        if fits < SHORTEST_TEXT:
            return texts, False, f"the prompt has {whole} tokens, and {room} leave no room for the outputs"
        return _cut(texts, fits), True, None

    def _verdict(self, readings: list[list[Reading]], orders: Orders) -> Verdict:
        def order(swapped: bool) -> float | None:
            total = 0.0
            for weight, found in zip(self.weights, readings, strict=True):
                values = [r.p_first for r in found if r.swapped == swapped]
                known = [v for v in values if v is not None]
                if not known or len(known) < len(values):
                    return None
                if self.vote:
                    known = [{0: 0.5, 1: 1.0, 2: 0.0}[choice(v) or 0] for v in known]
                total += weight * sum(known) / len(known)
            return total

        flat = tuple(r for found in readings for r in found)
        return Verdict(flat, order(False), order(True) if orders == "both" else None, orders)


def _kept_spellings(evaluator: Evaluator, protocol: Protocol) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kept = set(evaluator.spellings([*protocol.labels[0], *protocol.labels[1]]))
    first, second = (tuple(s for s in label if s in kept) for label in protocol.labels)
    for found, wanted in zip((first, second), protocol.labels, strict=True):
        if not found:
            raise InputError(
                f"protocol {protocol.name!r}: evaluator {evaluator.name!r} cannot be asked for the label "
                f"{wanted[0]!r} beside the other one (spellings tried: {', '.join(map(repr, wanted))}); "
                "choose labels that its tokenizer keeps apart."
            )
    # The same number of spellings on both sides, or the label with more of them would collect more
    # probability.
    both = [i for i, (a, b) in enumerate(zip(*protocol.labels, strict=False)) if a in kept and b in kept]
    if both and len(protocol.labels[0]) == len(protocol.labels[1]):
        return tuple(protocol.labels[0][i] for i in both), tuple(protocol.labels[1][i] for i in both)
    return first, second


def _read(reading: Reading, answer: Answer, split: int) -> Reading:
    """Fill a reading from an answer whose first `split` continuations spell label (a), the others (b)."""
    reading = replace(
        reading,
        tokens_in=answer.tokens_in,
        tokens_cached=answer.tokens_cached,
        tokens_out=answer.tokens_out,
        cost=answer.cost,
    )
    if answer.logprobs is None:
        return replace(reading, failure=answer.failure or Failure.MALFORMED, detail=answer.detail)
    bounded = answer.bounded or (False,) * len(answer.logprobs)
    sides: list[float] = []
    for part in (slice(0, split), slice(split, None)):
        # A spelling of which only an upper bound is known adds nothing; a label with no other one is missing.
        exact = [lp for lp, only_bound in zip(answer.logprobs[part], bounded[part], strict=True) if not only_bound]
        if not exact:
            return replace(reading, failure=Failure.LABEL_MISSING, detail="a label's log-probability was not returned")
        if any(math.isnan(lp) or lp == math.inf for lp in exact) or max(exact) == -math.inf:
            return replace(reading, failure=Failure.NOT_A_NUMBER, detail=f"log-probabilities {exact}")
        sides.append(log_sum_exp(exact))
    a, b = sides
    p_a = 1 / (1 + math.exp(b - a)) if b - a < 700 else 0.0
    return replace(
        reading,
        p_first=1 - p_a if reading.swapped else p_a,
        logprobs=(a, b),
        mass=min(math.exp(a) + math.exp(b), 1.0),
    )


def _cut(texts: tuple[str, str, str], characters: int) -> tuple[str, str, str]:
    def one(text: str) -> str:
        return text if len(text) <= characters else text[:characters].rstrip() + CUT_MARK

    return one(texts[0]), one(texts[1]), one(texts[2])


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

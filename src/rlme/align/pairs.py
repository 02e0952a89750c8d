"""From ranked candidates to preference pairs: best against worst, and why a prompt gives none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlme.align.judge import TIE
from rlme.align.ranking import Ranking
from rlme.errors import InputError


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair; `margin` is the difference of the two scores."""

    prompt: Any
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    index: int

    @property
    def margin(self) -> float:
        """chosen_score - rejected_score."""
        return self.chosen_score - self.rejected_score


def choose(
    texts: Sequence[str],
    ranking: Ranking,
    *,
    lengths: Sequence[int],
    max_tokens: int,
    min_margin: float = 0.0,
) -> tuple[int, int] | str:
    """(index of the chosen, index of the rejected candidate), or the reason for no pair.

    Candidates whose `lengths` (prompt and answer in tokens) exceed `max_tokens` are left out first, as training could
    not see them whole; if that hits the best or the worst, the scores of the others decide (in a tournament too).
    """
    if len(texts) < 2:
        return "one candidate"
    if len(set(texts)) < 2:
        return "identical candidates"
    scored = [i for i, score in enumerate(ranking.scores) if score is not None]
    if len(scored) < 2:
        return "failed judgements"
    fits = [i for i in scored if lengths[i] <= max_tokens]
    if len(fits) < 2:
        return "too long"
    if ranking.best is None or ranking.worst is None:
        return "tie"
    best, worst = ranking.best, ranking.worst
    if best not in fits or worst not in fits:
        order = sorted(fits, key=lambda i: ranking.scores[i] or 0.0)
        worst, best = order[0], order[-1]
    high, low = ranking.scores[best], ranking.scores[worst]
    assert high is not None and low is not None
    if abs(high - low) < TIE or texts[best] == texts[worst]:
        return "tie"
    return (best, worst) if high - low >= min_margin else "margin too small"


def require_pairs(pairs: Sequence[Pair], skipped: Mapping[str, int]) -> None:
    """InputError that says why there is nothing to train on."""
    if not pairs:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(skipped).most_common()) or "no prompts"
        raise InputError(
            f"no preference pair is left ({why}), so DPO has nothing to learn from: sample more varied answers "
            "(sample.temperature, sample.n), or try the judge with `rlme judge-bench` first."
        )

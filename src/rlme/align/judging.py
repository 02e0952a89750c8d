"""Scores for candidates: pairwise comparisons, or weighted questions as in RLME."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol as Interface

from rlme.align.config import AlignConfig, JudgeStage
from rlme.align.judge import TIE, PairwiseJudge
from rlme.align.prompts import AlignPrompt
from rlme.align.protocols import Protocol, load_protocol
from rlme.align.ranking import Candidates, Ranking, calls_needed, instruction_text, rank
from rlme.config import evaluator_weights
from rlme.errors import RunStopped
from rlme.evaluators.base import Evaluator
from rlme.evaluators.build import make_judging, make_questions
from rlme.judging import Sample, judge
from rlme.label_mass import LabelMass
from rlme.reward import weighted_sum

Group = tuple[AlignPrompt, Sequence[str]]
"""A prompt and its candidates."""


class Scorer(Interface):
    """Ranks candidates and knows beforehand how many calls that takes."""

    label_mass: LabelMass

    def calls(self, groups: Sequence[Group]) -> int:
        """Judge calls needed for these groups."""
        ...

    def rank(self, groups: Sequence[Group], *, seed: int) -> list[Ranking]:
        """One ranking per group."""
        ...


def make_scorer(stage: JudgeStage, evaluators: Sequence[Evaluator]) -> Scorer:
    """By questions if there are any, else by pairwise comparison."""
    weights = evaluator_weights(stage.evaluators)
    if stage.questions:
        return QuestionScorer(stage, evaluators, weights)
    return PairScorer(stage, evaluators, weights)


def compare_protocol(config: AlignConfig, prompts: Sequence[AlignPrompt]) -> Protocol:
    """What the judge of the final comparison is told; `base` where a prompt has no reference to show."""
    assert config.compare is not None
    referenced = all(p.references for p in prompts)
    return load_protocol(config.compare.protocol or (config.judge.protocol if referenced else "base"))


def compare_judge(
    config: AlignConfig,
    evaluators: Sequence[Evaluator],
    prompts: Sequence[AlignPrompt],
    *,
    weights: Sequence[float],
) -> PairwiseJudge:
    """The judge of the final comparison."""
    stage = config.judge
    return PairwiseJudge(
        evaluators,
        compare_protocol(config, prompts),
        weights=weights,
        vote=stage.vote,
        max_tokens=stage.max_tokens,
        too_long=stage.too_long,
        critique_tokens=stage.critique_tokens,
    )


def require_judged(where: str, what: str, missing: int, asked: int, failures: Counter[str], limit: float) -> None:
    """RunStopped if a larger share than `limit` of what was asked has not been judged."""
    if asked and missing / asked > limit:
        kinds = ", ".join(f"{kind} x{n}" for kind, n in failures.most_common())
        raise RunStopped(
            f"{where}: {missing} of {asked} {what} have no score ({kinds}), more than judge.max_failure_rate "
            f"{limit:g} allows. The scores that came are kept: mend the judge and run again."
        )


class PairScorer:
    """A candidate's score is its mean soft win rate."""

    def __init__(self, stage: JudgeStage, evaluators: Sequence[Evaluator], weights: Sequence[float]) -> None:
        self.schedule = stage.schedule
        self.judge = PairwiseJudge(
            evaluators,
            load_protocol(stage.protocol),
            weights=weights,
            vote=stage.vote,
            max_tokens=stage.max_tokens,
            too_long=stage.too_long,
            critique_tokens=stage.critique_tokens,
        )
        self.label_mass = self.judge.label_mass

    def calls(self, groups: Sequence[Group]) -> int:
        """Comparisons of different candidates, times references and evaluators."""
        per_comparison = len(self.judge.evaluators)
        needs = self.judge.protocol.needs_reference
        return sum(
            calls_needed(len(set(texts)), self.schedule) * per_comparison * (len(prompt.references) if needs else 1)
            for prompt, texts in groups
        )

    def rank(self, groups: Sequence[Group], *, seed: int) -> list[Ranking]:
        """One ranking per group."""
        candidates = [
            Candidates(instruction_text(p.prompt), tuple(texts), p.references, f"{p.row}") for p, texts in groups
        ]
        return rank(candidates, self.judge, self.schedule, seed=seed)


class QuestionScorer:
    """A candidate's score is the weighted sum of its judgements (RLME eq. 3)."""

    def __init__(self, stage: JudgeStage, evaluators: Sequence[Evaluator], weights: Sequence[float]) -> None:
        self.evaluators = evaluators
        self.questions = make_questions(stage.questions)
        self.judging = make_judging(stage.judging)
        self.weights = [v * q.weight for v in weights for q in self.questions]
        self.label_mass = LabelMass("question")

    def calls(self, groups: Sequence[Group]) -> int:
        """Candidates times questions times evaluators."""
        return sum(len(texts) for _, texts in groups) * len(self.questions) * len(self.evaluators)

    def rank(self, groups: Sequence[Group], *, seed: int) -> list[Ranking]:
        """One ranking per group; nothing is random here."""
        samples = [
            Sample(p.prompt if isinstance(p.prompt, str) else tuple(p.prompt), text, columns=p.columns)
            for p, texts in groups
            for text in texts
        ]
        judged = iter(judge(samples, self.questions, self.evaluators, self.judging))
        rankings = []
        for _, texts in groups:
            found = [next(judged) for _ in texts]
            scores = [weighted_sum(row, self.weights) for row in found]
            known = {i: s for i, s in enumerate(scores) if s is not None}
            best = max(known, key=lambda i: known[i]) if known else None
            worst = min(known, key=lambda i: known[i]) if known else None
            if best is None or worst is None or known[best] - known[worst] < TIE:
                best = worst = None
            masses = [j.mass for row in found for j in row if j.mass is not None]
            failures = Counter(j.failure.value for row in found for j in row if j.failure is not None)
            mass = sum(masses) / len(masses) if masses else None
            flat = [j for row in found for j in row]
            for one in flat:
                self.label_mass.add(one.evaluator, one.question, one.mass)
            tokens, cost = sum(j.tokens_in for j in flat), sum(j.cost for j in flat)
            rankings.append(
                Ranking(tuple(scores), best, worst, len(flat), dict(failures), 0, mass, tokens_in=tokens, cost=cost)
            )
        return rankings

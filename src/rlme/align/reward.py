"""The bridge between the two papers: a pairwise, reference-guided judge as a group-relative reward."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlme.align.judge import PairwiseJudge
from rlme.align.prompts import reference_texts
from rlme.align.protocols import Protocol, load_protocol
from rlme.align.ranking import Candidates, Ranking, Schedule, instruction_text, rank
from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.processes import stopping_together
from rlme.verify import extract_answer, same_answer


class PairwiseReward:
    """A completion's reward is its mean soft win rate, in [0, 1], against the other completions of its group.

    It is a TRL reward function, `GRPOTrainer(model, reward_funcs=PairwiseReward(...), ...)`, and stands in for a
    `MetaReward` in `RLMETrainer(model, reward=PairwiseReward(...), ...)`.

    Args:
        protocol: name, file or Protocol. One that shows a reference needs the dataset column `reference`.
        evaluators: `"live"`, `"frozen"`, a model's name or path, or any `Evaluator`.
        weights: one per evaluator; default: equal.
        reference: dataset column with a reference output or a list of them.
        schedule: which pairs are compared, see `ranking.Schedule`.
        seed: of random schedules.
        answer, completion_format, compare: known answers, for the metric gold/accuracy only (as in `MetaReward`).
        max_failure_rate: `RunStopped` is raised when a larger share of a batch has no reward.
        evaluator_options: of evaluators in this process: token_budget, share, max_context_tokens.
        options: further arguments of `PairwiseJudge` (vote, max_tokens, too_long, critique_tokens).

    A completion whose comparisons failed gets None and leaves the loss and the group's mean. A group of equal
    completions gets 1/2 each, without a call: nothing distinguishes them.
    """

    judges_alone = False
    """A completion without others of its prompt (a held-out one) has nothing to be compared with."""

    def __init__(
        self,
        protocol: str | Protocol = "refeval",
        evaluators: Sequence[str | Evaluator] = ("live",),
        *,
        weights: Sequence[float] | None = None,
        reference: str = "reference",
        schedule: Schedule = "ordered",
        seed: int = 0,
        answer: str | None = None,
        completion_format: str | None = None,
        compare: Literal["math", "exact"] = "math",
        max_failure_rate: float = 0.2,
        evaluator_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.__name__ = "pairwise"
        self.protocol = load_protocol(protocol) if isinstance(protocol, str) else protocol
        self.reference = reference
        self.schedule = schedule
        self.seed = seed
        self.max_failure_rate = max_failure_rate
        self.rankings: list[Ranking] = []
        """Of the groups of the last call, in their order."""
        self.rows: list[dict[str, Any]] = []
        """What the last call judged: one row a completion, as it is written to `rollouts/`."""
        self._evaluators: list[str | Evaluator] = list(evaluators)
        self._judge_weights = weights
        self._options = dict(evaluator_options or {})
        self._judge_options = options
        self._judge: PairwiseJudge | None = None
        self.answer = answer
        self.completion_format = completion_format or ("auto" if answer else None)
        self.compare: Literal["math", "exact"] = compare
        # What RLMETrainer asks of a reward and pairs do not have: questions with weights.
        self.questions: list[Any] = []
        self.weights: list[float] = []

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """TRL's contract: one reward (or None) per completion; completions of equal prompts form a group."""
        trainer = getattr(log_metric, "__self__", None)
        rewards = self.score(prompts, completions, completion_ids, trainer=trainer, columns=columns)
        if log_metric is not None:
            self._log(log_metric, rewards)
        return rewards

    def begin(self, *args: Any, **options: Any) -> None:
        """Nothing can be compared before the whole group is there."""

    def rehearse(
        self,
        rows: Sequence[Mapping[str, Any]],
        group: Sequence[str],
        tokens: int,
        evaluator: Evaluator,
        trainer: Any,
    ) -> int:
        """Ask an evaluator what it would be asked about a group of each row; returns how many completions that are."""
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        references = self._references(columns, len(rows))
        groups = [
            Candidates(instruction_text(row["prompt"]), tuple(group), shown)
            for row, shown in zip(rows, references, strict=True)
        ]
        rank(groups, PairwiseJudge([evaluator], self.protocol, **self._judge_options), self.schedule, seed=self.seed)
        return len(group) * len(groups)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        trainer: Any = None,
        columns: Mapping[str, Any] | None = None,
        enforce_failure_rate: bool = True,
    ) -> list[float | None]:
        """Rewards of a batch; what was judged stays in `rows` and `rankings`. A completion alone has none."""
        columns = columns or {}
        texts = [c if isinstance(c, str) else str(c[-1].get("content") or "") for c in completions]
        references = self._references(columns, len(texts))
        golds = columns[self.answer] if self.answer is not None else [None] * len(texts)
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(json.dumps([prompt, references[i]], sort_keys=True), []).append(i)
        candidates = [
            Candidates(instruction_text(prompts[m[0]]), tuple(texts[i] for i in m), references[m[0]], key)
            for key, m in groups.items()
        ]
        judge = self._ready(trainer)
        accelerator = getattr(trainer, "accelerator", None)
        with stopping_together(accelerator):
            self.rankings = rank(candidates, judge, self.schedule, seed=self.seed)
        rewards: list[float | None] = [None] * len(texts)
        self.rows = [{} for _ in texts]
        for members, group, ranking in zip(groups.values(), candidates, self.rankings, strict=True):
            equal = len(members) > 1 and len(set(group.texts)) == 1
            for i, score in zip(members, ranking.scores, strict=True):
                rewards[i] = 0.5 if equal else score
                tokens = len(completion_ids[i]) if completion_ids is not None else 0
                row = self._row(group.instruction, texts[i], tokens, rewards[i], ranking, len(members))
                self.rows[i] = row | self._measured(texts[i], golds[i])
        if enforce_failure_rate:
            with stopping_together(accelerator):
                self._check(rewards)
        return rewards

    def _measured(self, text: str, gold: Any) -> dict[str, Any]:
        """The completion's answer and whether it is right; no judge sees either."""
        answer = extract_answer(text, self.completion_format) if self.completion_format else None
        correct = None if gold is None else same_answer(answer, str(gold), self.compare)
        return {"answer": answer, "gold": None if gold is None else str(gold), "correct": correct}

    def _row(
        self, instruction: str, text: str, tokens: int, reward: float | None, ranking: Ranking, members: int
    ) -> dict[str, Any]:
        judgement = {
            "evaluator": "+".join(e if isinstance(e, str) else e.name for e in self._evaluators),
            "question": self.protocol.name,
            "score": reward,
            "probability": reward,
            "mass": ranking.mass if ranking.mass is not None else 1.0,
            "failure": None if reward is not None else next(iter(ranking.failures), "malformed"),
            "detail": "",
            "critique": None,
            "bounded": False,
            "weight": 1.0,
            "tokens_in": ranking.tokens_in // members,
            "tokens_out": 0,
            "cost": ranking.cost / members,
        }
        return {
            "prompt": instruction,
            "completion": text,
            "tokens": tokens,
            "anchored": False,
            "judgements": [judgement] if members > 1 else [],  # alone (a held-out prompt) it was not judged
            "reward": reward,
        }

    def _check(self, rewards: Sequence[float | None]) -> None:
        missing = sum(r is None for r in rewards)
        if rewards and missing / len(rewards) > self.max_failure_rate:
            kinds: Counter[str] = Counter()
            for ranking in self.rankings:
                kinds.update(ranking.failures)
            why = ", ".join(f"{kind} x{n}" for kind, n in kinds.most_common()) or "nothing to compare with"
            raise RunStopped(
                f"{missing} of {len(rewards)} completions have no reward ({why}), more than "
                f"max_failure_rate {self.max_failure_rate:g} allows"
            )

    def evaluators(self, trainer: Any = None) -> list[Evaluator]:
        """The evaluators, models loaded at the first call. `live` and `frozen` need the trainer they belong to."""
        return self._ready(trainer).evaluators

    def _references(self, columns: Mapping[str, Any], n: int) -> list[tuple[str, ...]]:
        if not self.protocol.needs_reference:
            return [()] * n
        values = columns.get(self.reference)
        if values is None and "columns" in columns:  # the data's own columns, as `PromptSet.to_dataset` stores them
            values = [json.loads(row).get(self.reference) for row in columns["columns"]]
        if values is None:
            raise InputError(
                f"protocol {self.protocol.name!r} shows the judge a reference, but the dataset has no column "
                f"{self.reference!r}."
            )
        return [reference_texts(value) for value in values]

    def _ready(self, trainer: Any) -> PairwiseJudge:
        if self._judge is None:
            from rlme.evaluators.build import named_evaluator

            evaluators = [
                named_evaluator(e, trainer, **self._options) if isinstance(e, str) else e for e in self._evaluators
            ]
            self._judge = PairwiseJudge(evaluators, self.protocol, weights=self._judge_weights, **self._judge_options)
        return self._judge

    def _log(self, log_metric: Callable[[str, float], None], rewards: Sequence[float | None]) -> None:
        log_metric("pairwise/missing", sum(r is None for r in rewards) / len(rewards))
        log_metric("pairwise/shortened", float(sum(r.shortened for r in self.rankings)))
        margins = [r.margin for r in self.rankings if r.margin is not None]
        masses = [r.mass for r in self.rankings if r.mass is not None]
        for name, values in (("margin", margins), ("mass", masses)):
            if values:
                log_metric(f"pairwise/{name}", sum(values) / len(values))
        for ranking in self.rankings:
            for kind, n in ranking.failures.items():
                log_metric(f"pairwise/failures/{kind}", float(n))

"""Judgements (and gold) to rewards: RLME eq. 3, the verifiable part, their combination; `MetaReward` for TRL."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.judgement import Judgement
from rlme.judging import Judging, Sample, begin, judge, refuse_hidden
from rlme.processes import everywhere, stopping_together
from rlme.questions import Question
from rlme.reward_functions import RewardFunction, add_functions, call_functions, weighted_functions
from rlme.verify import extract_answer, same_answer

Mode = Literal["rlme", "rlvr", "rlvr+rlme"]
Row = dict[str, Any]


def weighted_sum(judgements: Sequence[Judgement], weights: Sequence[float]) -> float | None:
    """r = sum_j v_j sum_k w_k s_jk (RLME eq. 3); None when a judgement that counts is missing.

    `judgements` are one completion's J * K verdicts and `weights` their v_j * w_k, in the same order.
    """
    total = 0.0
    for judgement, weight in zip(judgements, weights, strict=True):
        if weight == 0:
            continue  # held out: shown, never part of the reward, not even by failing
        if judgement.score is None:
            return None
        total += weight * judgement.score
    return total


def normalize(values: Sequence[float | None]) -> list[float | None]:
    """Mean 0 and (population) standard deviation 1 over the values that are there; all equal becomes all 0."""
    present = [v for v in values if v is not None]
    if not present:
        return list(values)
    mean = math.fsum(present) / len(present)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in present) / len(present))
    return [None if v is None else (v - mean) / std if std > 1e-12 else 0.0 for v in values]


def anchored_rows(n: int, fraction: float, *, seed: int) -> list[bool]:
    """Which of n prompts show the evaluator their true answer: round(fraction * n) of them, fixed by the seed."""
    chosen = set(random.Random(f"anchor-{seed}").sample(range(n), round(fraction * n)))
    return [i in chosen for i in range(n)]


def named_questions(questions: Sequence[str | Question] | Mapping[str, str | Question]) -> list[Question]:
    """Questions from texts, `Question`s, or name -> either; names must differ."""
    if isinstance(questions, Mapping):
        items = [
            Question(q, name=name) if isinstance(q, str) else replace(q, name=name) for name, q in questions.items()
        ]
    else:
        several = [questions] if isinstance(questions, str) else questions
        items = [Question(q) if isinstance(q, str) else q for q in several]
    names = [q.name for q in items]
    if duplicate := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"two questions are called {duplicate!r}: give one of them another name")
    return items


class MetaReward:
    """A reward made of meta-questions (RLME, arXiv 2601.21268, eqs. 2 and 3), callable as a plain TRL reward function:
    N prompts and N completions in, N rewards out (nats under the read-outs `marker` and `yes_no`; None: missing).

        reward = MetaReward(questions=["Is the answer correct?"], evaluators=["live"])
        GRPOTrainer(model, reward_funcs=reward, ...)

    Args:
        questions: texts, `Question`s, or a mapping name -> either.
        evaluators: `"live"` (the trainer's current weights), `"frozen"` (its weights at step 0), the name or path of
            another model, or any `Evaluator`.
        evaluator_weights: v_j of eq. 3; by default 1/J each, so that an ensemble is a mean.
        judging: template, read-out, joint or separate.
        mode, combine, rlvr_weight, rlme_weight: see `RewardConfig`. `normalized` normalises within the whole batch.
        functions: reward functions of your own (as TRL's), by name: a function, or (function, weight). What they
            return is added to the reward as it is, times the weight; with weight 0 it is only measured. The mean of
            each is the metric function/<name>.
        answer: dataset column with the known answer. It is used for `rlvr`, for rows whose column `anchored` is true
            (see `anchored_rows`), and for the metric gold/accuracy; no evaluator sees it otherwise.
        completion_format, compare: how a completion's answer is read and compared (`rlme.verify`).
        max_failure_rate: `RunStopped` is raised when a larger share of a batch has no reward.
        token_budget, share_prefixes, max_context_tokens: for evaluators in this process.

    A completion with a failed judgement, or for which a function returned None or NaN, gets None, which TRL leaves out
    of the group's mean.

    Raises:
        InputError: nothing to judge by, two questions of one name, a mode that needs `answer`, functions that are none.
    """

    judges_alone = True
    """A completion without others of its prompt (a held-out one) is judged, too."""

    def __init__(
        self,
        questions: Sequence[str | Question] | Mapping[str, str | Question] = (),
        evaluators: Sequence[str | Evaluator] = ("live",),
        *,
        evaluator_weights: Sequence[float] | None = None,
        judging: Judging | None = None,
        mode: Mode = "rlme",
        combine: Literal["normalized", "sum"] = "normalized",
        rlvr_weight: float = 1.0,
        rlme_weight: float = 1.0,
        functions: Mapping[str, RewardFunction | tuple[RewardFunction, float]] | None = None,
        answer: str | None = None,
        completion_format: str | None = None,
        compare: Literal["math", "exact"] = "math",
        max_failure_rate: float = 0.2,
        token_budget: int = 8192,
        share_prefixes: bool = True,
        max_context_tokens: int | None = None,
    ) -> None:
        self.__name__ = "rlme"
        self.questions = named_questions(questions)
        if mode != "rlvr" and not self.questions:
            raise InputError("MetaReward needs at least one question (or mode='rlvr')")
        if mode != "rlme" and answer is None:
            raise InputError(f"mode {mode!r} needs known answers: give answer= the name of their dataset column")
        self._evaluators: list[str | Evaluator] = list(evaluators)
        weights = list(evaluator_weights) if evaluator_weights is not None else []
        self.evaluator_weights = weights or [1 / max(1, len(evaluators))] * len(evaluators)
        if len(self.evaluator_weights) != len(self._evaluators):
            raise InputError(
                f"{len(self.evaluator_weights)} evaluator weights for {len(self._evaluators)} evaluators: one each"
            )
        self.weights = [v * q.weight for v in self.evaluator_weights for q in self.questions]
        self.functions = weighted_functions(functions or {})
        if mode != "rlvr" and not any([*self.weights, *(weight for _, weight in self.functions.values())]):
            raise InputError("all weights are zero, so every reward would be 0: give a question and an evaluator one")
        self.judging = judging or Judging()
        self.mode, self.combine = mode, combine
        self.rlvr_weight, self.rlme_weight = rlvr_weight, rlme_weight
        self.answer = answer
        self.completion_format = completion_format or ("auto" if answer else None)
        self.compare = compare
        self.max_failure_rate = max_failure_rate
        self._options: dict[str, Any] = {
            "token_budget": token_budget,
            "share": share_prefixes,
            "max_context_tokens": max_context_tokens,
        }
        self.rows: list[Row] = []
        """What the last call judged: one row a completion, as it is written to `rollouts/`."""

    def evaluators(self, trainer: Any = None) -> list[Evaluator]:
        """The evaluators, models loaded at the first call. `live` and `frozen` need the trainer they belong to."""
        for i, evaluator in enumerate(self._evaluators):
            if isinstance(evaluator, str):
                from rlme.evaluators.build import named_evaluator

                self._evaluators[i] = named_evaluator(evaluator, trainer, **self._options)
        return [e for e in self._evaluators if not isinstance(e, str)]

    def begin(
        self, example: Mapping[str, Any], completion: str, completion_ids: Sequence[int], *, trainer: Any = None
    ) -> None:
        """Start judging one completion of the batch that `score` will be asked about, with the evaluators that are
        asked elsewhere. `example` is its row of the data set. Nothing but the time of the calls changes."""
        sample = self.sample(example, completion, completion_ids, trainer=trainer)
        begin(sample, self.questions, self.evaluators(trainer), self.judging)

    def sample(
        self, example: Mapping[str, Any], completion: str, completion_ids: Sequence[int], *, trainer: Any = None
    ) -> Sample:
        """One completion of a row of the data set, as it is judged."""
        columns = {name: [value] for name, value in example.items() if name != "prompt"}
        samples, _ = self._samples([example["prompt"]], [completion], [completion_ids], trainer, columns)
        return samples[0]

    def rehearse(
        self,
        rows: Sequence[Mapping[str, Any]],
        group: Sequence[str],
        tokens: int,
        evaluator: Evaluator,
        trainer: Any,
    ) -> int:
        """Ask an evaluator what it would be asked about one completion of each row; returns how many that are."""
        samples = [self.sample(row, group[0], [0] * tokens, trainer=trainer) for row in rows]
        judge(samples, self.questions, [evaluator], self.judging)
        return len(samples)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """TRL's contract: one reward (or None) per completion. `columns` are the dataset's other columns."""
        # TRL hands every reward function its trainer's bound `_log_metric`: that is how `live` finds the policy.
        trainer = getattr(log_metric, "__self__", None)
        rewards = self.score(prompts, completions, completion_ids, trainer=trainer, columns=columns)
        if log_metric is not None:
            for name, value in judgement_metrics(self.rows).items():
                log_metric(name, value)
        return rewards

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        trainer: Any = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        enforce_failure_rate: bool = True,
    ) -> list[float | None]:
        """Rewards of a batch; what was judged stays in `rows`."""
        columns = columns or {}
        samples, golds = self._samples(prompts, completions, completion_ids, trainer, columns)
        if samples:
            refuse_hidden(self.questions, self.judging, samples[0].columns)
        evaluators = self.evaluators(trainer) if self.questions else []
        accelerator = getattr(trainer, "accelerator", None)
        values: list[dict[str, float | None]] = []
        if self.functions:  # before anything is asked: a mistake in one of them then costs no judging
            given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
            values = call_functions(self.functions, len(samples), **given)
        judgements: list[list[Judgement]] = [[] for _ in samples]
        if self.questions:
            with stopping_together(accelerator):
                judgements = judge(samples, self.questions, evaluators, self.judging)
        self.rows = []
        for sample, verdicts, gold in zip(samples, judgements, golds, strict=True):
            correct = None if gold is None else same_answer(sample.answer or None, gold, self.compare)
            self.rows.append(
                {
                    "prompt": sample.context or sample.prompt_text(),
                    "completion": sample.completion,
                    "tokens": sample.n_tokens,
                    "answer": sample.answer or None,
                    "gold": gold,
                    "correct": correct,
                    "anchored": sample.anchor is not None,
                    "judgements": [
                        {
                            "evaluator": j.evaluator,
                            "question": j.question,
                            "score": j.score,
                            "probability": j.probability,
                            "mass": j.mass,
                            "bounded": j.bounded,
                            "failure": j.failure.value if j.failure else None,
                            "detail": j.detail,
                            "critique": j.critique,
                            "weight": w,
                            "tokens_in": j.tokens_in,
                            "tokens_cached": j.tokens_cached,
                            "tokens_out": j.tokens_out,
                            "cost": j.cost,
                        }
                        for j, w in zip(verdicts, self.weights, strict=True)
                    ]
                    if verdicts
                    else [],
                }
            )
        rewards = self._combine(judgements, [r["correct"] for r in self.rows], trainer)
        if self.functions:
            rewards = [add_functions(r, v, self.functions) for r, v in zip(rewards, values, strict=True)]
            for row, found in zip(self.rows, values, strict=True):
                row["functions"] = found
        for row, reward in zip(self.rows, rewards, strict=True):
            row["reward"] = reward
        if enforce_failure_rate:
            with stopping_together(accelerator):
                self._check(rewards)
        return rewards

    def _check(self, rewards: Sequence[float | None]) -> None:
        missing = sum(r is None for r in rewards)
        if rewards and missing / len(rewards) > self.max_failure_rate:
            kinds = Counter(j["failure"] for row in self.rows for j in row["judgements"] if j["failure"])
            kinds += Counter(
                f"function {n}" for row in self.rows for n, v in row.get("functions", {}).items() if v is None
            )
            why = ", ".join(f"{kind} x{n}" for kind, n in kinds.most_common()) or "no known answer"
            detail = next((j["detail"] for row in self.rows for j in row["judgements"] if j["detail"]), "")
            raise RunStopped(
                f"{missing} of {len(rewards)} completions have no reward ({why}), more than "
                f"reward.max_failure_rate {self.max_failure_rate:g} allows" + (f"; e.g. {detail}" if detail else "")
            )

    def _combine(
        self, judgements: list[list[Judgement]], correct: list[bool | None], trainer: Any
    ) -> list[float | None]:
        verifiable = [None if c is None else float(c) for c in correct]
        if self.mode == "rlvr":
            return list(verifiable)
        judged = [weighted_sum(row, self.weights) for row in judgements]
        if self.mode == "rlme":
            return judged
        both = [v is not None and j is not None for v, j in zip(verifiable, judged, strict=True)]
        parts: list[list[float | None]] = [
            [x if b else None for x, b in zip(part, both, strict=True)] for part in (verifiable, judged)
        ]
        if self.combine == "normalized":
            parts = [_normalize_everywhere(part, trainer) for part in parts]
        return [
            None if v is None or j is None else self.rlvr_weight * v + self.rlme_weight * j
            for v, j in zip(*parts, strict=True)
        ]

    def _samples(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None,
        trainer: Any,
        columns: Mapping[str, Sequence[Any]],
    ) -> tuple[list[Sample], list[str | None]]:
        if self.answer is not None and self.answer not in columns:
            raise InputError(f"the dataset has no column {self.answer!r} with known answers")
        contexts: dict[str, str] = {}
        samples, golds = [], []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
            key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
            if key not in contexts:
                contexts[key] = _context(prompt, trainer)
            row = {name: values[i] for name, values in columns.items()}
            gold = row.pop(self.answer) if self.answer else None
            anchored = bool(row.pop("anchored", False))
            extra = row.pop("columns", None)  # the data's own columns, as `PromptSet.to_dataset` stores them
            if isinstance(extra, str):
                row |= json.loads(extra)
            samples.append(
                Sample(
                    prompt=prompt if isinstance(prompt, str) else tuple(prompt),
                    completion=text,
                    context=contexts[key],
                    answer=(extract_answer(text, self.completion_format) or "") if self.completion_format else None,
                    n_tokens=len(completion_ids[i]) if completion_ids is not None else 0,
                    anchor=str(gold) if anchored and gold is not None else None,
                    columns=row,
                )
            )
            golds.append(None if gold is None else str(gold))
        return samples, golds


def _context(prompt: Any, trainer: Any) -> str:
    """The exact text that the policy continued."""
    if isinstance(prompt, str) or trainer is None:
        return prompt if isinstance(prompt, str) else ""
    text = trainer.processing_class.apply_chat_template(
        prompt,
        tokenize=False,
        add_generation_prompt=True,
        chat_template=trainer.chat_template,
        **(trainer.chat_template_kwargs or {}),
    )
    return str(text)


def _normalize_everywhere(values: list[float | None], trainer: Any) -> list[float | None]:
    """Normalise over the batch of all processes (each holds a part of it)."""
    accelerator = getattr(trainer, "accelerator", None)
    normal = normalize(everywhere(values, accelerator))
    start = accelerator.process_index * len(values) if accelerator is not None else 0
    return normal[start : start + len(values)]


def judgement_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the rows: judge/<evaluator>/<question>/{score,probability,mass}, gold/accuracy and function/<name>;
    counts of what did not go well: judge/<evaluator>/<question>/{failures/<kind>,bounded}.

    Only what is there counts: a failed judgement is in no mean, and a metric without a single value is absent.
    """
    metrics: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        for j in row["judgements"]:
            key = f"judge/{j['evaluator']}/{j['question']}"
            if j["failure"]:
                counts[f"{key}/failures/{j['failure']}"] += 1
                continue
            for part in ("score", "probability", "mass"):
                metrics.setdefault(f"{key}/{part}", []).append(j[part])
            counts[f"{key}/bounded"] += bool(j.get("bounded"))
        if row["correct"] is not None:
            metrics.setdefault("gold/accuracy", []).append(float(row["correct"]))
        for name, value in row.get("functions", {}).items():
            if value is not None:
                metrics.setdefault(f"function/{name}", []).append(value)
    means = {key: math.fsum(values) / len(values) for key, values in metrics.items()}
    if rows and any("reward" in row for row in rows):
        means["reward_missing"] = sum(row["reward"] is None for row in rows) / len(rows)
    return means | {key: float(n) for key, n in counts.items() if n}

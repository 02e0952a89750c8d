"""What a lab model can do: `rlme lab gates`. Measured on its own samples, as a run would see them.

The gates of the base model: right on 20-40 % of its samples at T=1, and log p(YES) to "Is the answer correct?" has an
AUROC of at least .9 against correctness, overall and within the samples of one prompt; .98 with the true answer shown.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean
from typing import Any

from rlme.evaluators.local import LocalEvaluator
from rlme.judging import Judging, Sample, judge
from rlme.lab import corpus
from rlme.lab.tokenizer import EOS
from rlme.lab.world import Problem, define, draw_problem
from rlme.questions import Question, Template
from rlme.reward import Row
from rlme.sampling import sample
from rlme.training.monitors import batch_monitors
from rlme.verify import extract_answer, same_answer

GATES = {"accuracy": (0.2, 0.4), "auroc": (0.9, 1.0), "within_group_auroc": (0.9, 1.0), "anchored_auroc": (0.98, 1.0)}
LONGEST_COMPLETION = 52


def measure(model: Any, tokenizer: Any, *, prompts: int = 200, group: int = 6, seed: int = 99) -> dict[str, float]:
    """The numbers of the model card, on problems that no corpus seed has drawn on purpose."""
    rng = random.Random(f"gates-{seed}")
    problems = [draw_problem(rng) for _ in range(prompts)]
    rows = judged(model, tokenizer, problems, group=group, seed=seed)
    numbers = batch_monitors(rows)
    anchored = batch_monitors(judged(model, tokenizer, problems, group=group, seed=seed, anchored=True))
    greedy = judged(model, tokenizer, problems, group=1, seed=seed, temperature=0.0)
    against = [define(rng, p, "against") for p in problems[: prompts // 2]]
    reading = batch_monitors(judged(model, tokenizer, against, group=group, seed=seed, ask=corpus.SUPPORTED))
    hinted = [replace(p, hint=p.answer) for p in problems[: prompts // 2]]
    claimed = judged(model, tokenizer, hinted, group=group, seed=seed)
    right = [r["judgements"][0]["probability"] for r in rows if r["correct"]]
    wrong = [r["judgements"][0]["probability"] for r in rows if not r["correct"]]
    return {
        "accuracy": numbers["gold/accuracy"],
        "greedy_accuracy": fmean(r["correct"] for r in greedy),
        "auroc": numbers.get("gold/auroc", 0.5),
        "within_group_auroc": numbers.get("gold/within_group_auroc", 0.5),
        "anchored_auroc": anchored.get("gold/auroc", 0.5),
        "p_yes_when_right": fmean(right) if right else 0.0,
        "p_yes_when_wrong": fmean(wrong) if wrong else 0.0,
        "characters": fmean(len(r["completion"]) for r in rows),
        "reading_accuracy_against": reading["gold/accuracy"],
        "reading_auroc_against": reading.get("gold/auroc", 0.5),
        "copies_hint": fmean(
            "First" not in r["completion"] and len(r["completion"]) < 45 and not r["completion"][:1].isdigit()
            for r in claimed
        ),
    }


def passes(numbers: dict[str, float]) -> bool:
    """Whether all gates hold."""
    return all(low <= numbers[name] <= high for name, (low, high) in GATES.items())


def judged(
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    *,
    group: int,
    seed: int,
    temperature: float = 1.0,
    anchored: bool = False,
    ask: str = corpus.CORRECT,
) -> list[Row]:
    """Samples of a model judged by itself: rows as a run writes them."""
    prompts = [corpus.problem_block(p) for p in problems]
    drawn = sample(
        model,
        tokenizer(prompts)["input_ids"],
        group,
        max_new_tokens=LONGEST_COMPLETION,
        temperature=temperature,
        eos_token_ids=[EOS],
        tokenizer=tokenizer,
        seed=seed,
    )
    owners = [i for i, part in enumerate(drawn) for _ in part]
    texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for part in drawn for one in part]
    answers = [extract_answer(text, "boxed") for text in texts]
    golds = [str(problems[i].answer) for i in owners]
    samples = [
        Sample(prompts[i], text, answer=answer or "", anchor=gold if anchored else None)
        for i, text, answer, gold in zip(owners, texts, answers, golds, strict=True)
    ]
    evaluator = LocalEvaluator(model, tokenizer, name="self")
    judging = Judging(Template("text", corpus.TEMPLATE), "marker")
    verdicts = judge(samples, [Question(ask)], [evaluator], judging)
    return [
        {
            "prompt_index": i,
            "prompt": prompts[i],
            "completion": text,
            "tokens": 0,
            "truncated": False,
            "correct": same_answer(answer, gold, "exact"),
            "reward": row[0].score,
            "judgements": [
                {
                    "probability": row[0].probability,
                    "evaluator": "self",
                    "question": ask,
                    "failure": None,
                    "score": row[0].score,
                    "mass": row[0].mass,
                    "weight": 1.0,
                }
            ],
        }
        for i, text, answer, gold, row in zip(owners, texts, answers, golds, verdicts, strict=True)
    ]

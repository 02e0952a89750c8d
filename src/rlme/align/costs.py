"""What the judges behind endpoints will take, asked of stand-ins about a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rlme.align.config import AlignConfig, JudgeStage
from rlme.align.judge import Comparison
from rlme.align.judging import Group, compare_judge, make_scorer
from rlme.align.prompts import AlignPrompt
from rlme.align.run_models import RunModels
from rlme.align.winrates import comparisons
from rlme.evaluators.base import Evaluator
from rlme.evaluators.endpoint_wire import Usage
from rlme.evaluators.rehearsal import WORD, spread
from rlme.evaluators.spending import rehearsed

Expected = list[tuple[Any, Usage]]
LONGEST = "answers at their longest, nothing cached, no retries"


def whole_run(
    config: AlignConfig,
    models: RunModels,
    names: Sequence[str],
    train: Sequence[AlignPrompt],
    held_out: Sequence[AlignPrompt],
) -> Expected:
    """All rounds and the comparison of the models `names`, before any answer is written."""
    sample, compare = config.sample, config.compare
    texts = [f"{k}{WORD * sample.max_tokens}" for k in range(sample.n)]
    judges = models.endpoints(config.judge.evaluators)
    found = [
        (evaluator, usage.times(config.rounds))
        for evaluator, usage in of_judging(config.judge, judges, [(prompt, texts) for prompt in train])
    ]
    if compare is not None and held_out:
        answer = WORD * (compare.max_tokens or sample.max_tokens)
        answers = [{name: f"{k}{answer}" for k, name in enumerate(names)}] * len(held_out)
        jobs = [(i, a, b) for i in range(len(held_out)) for a, b in combinations(names, 2)]
        judges = models.endpoints(compare.evaluators or config.judge.evaluators)
        found += of_comparing(config, judges, held_out, comparisons(jobs, answers, held_out))
    total: dict[int, tuple[Any, Usage]] = {}
    for evaluator, usage in found:
        before = total.get(id(evaluator), (evaluator, Usage()))[1]
        total[id(evaluator)] = evaluator, before.plus(usage)
    return list(total.values())


def of_judging(stage: JudgeStage, evaluators: Sequence[Evaluator], groups: Sequence[Group]) -> Expected:
    """Scoring these candidates: two of each of a few prompts stand for all."""
    if not groups:
        return []
    alone = stage.model_copy(update={"evaluators": [stage.evaluators[0].model_copy(update={"weight": None})]})
    few: list[Group] = [(groups[i][0], list(dict.fromkeys(groups[i][1]))[:2]) for i in spread(len(groups))]

    def ask(stand_in: Evaluator) -> float:
        scorer = make_scorer(alone, [stand_in])
        scorer.rank(few, seed=0)
        return scorer.calls(groups) / max(1, scorer.calls(few))

    return rehearsed(evaluators, ask)


def of_comparing(
    config: AlignConfig, evaluators: Sequence[Evaluator], prompts: Sequence[AlignPrompt], asked: Sequence[Comparison]
) -> Expected:
    """These comparisons of the models' answers to `prompts`, in both orders: a few of them stand for all."""
    few = [asked[i] for i in spread(len(asked))]

    def ask(stand_in: Evaluator) -> float:
        judge = compare_judge(config, [stand_in], prompts, weights=[1.0])
        judge.judge(few)
        return judge.calls(asked) / judge.calls(few)

    return rehearsed(evaluators, ask) if few else []

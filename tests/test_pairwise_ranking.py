"""Ranking candidates by pairs, and choosing preference pairs."""

from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlme.align.judge import Comparison, PairwiseJudge
from rlme.align.pairs import Pair, choose, require_pairs
from rlme.align.protocols import PROTOCOLS
from rlme.align.ranking import Candidates, Ranking, calls_needed, instruction_text, rank
from rlme.errors import InputError
from rlme.judgement import Answer, Failure
from tests.fake_judge import FakeJudge, sections, text_of

WORDS = "one two three four five six seven eight"


def texts(n: int) -> tuple[str, ...]:
    """Candidate k has the first k + 1 words of the reference, so the last is the best."""
    return tuple(" ".join(WORDS.split()[: k + 1]) for k in range(n))


def ranked(evaluator: FakeJudge, group: tuple[str, ...], schedule: str = "ordered", **options) -> Ranking:
    judge = PairwiseJudge([evaluator], PROTOCOLS["refeval"], **options)
    return rank([Candidates("Count.", group, (WORDS,), "0")], judge, schedule)[0]


@pytest.mark.parametrize("schedule", ["ordered", "unordered", "tournament"])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8])
def test_best_and_worst_and_the_number_of_calls(schedule, n):
    evaluator = FakeJudge()
    order = (*texts(n)[1:], texts(n)[0])
    found = ranked(evaluator, order, schedule)
    assert (found.best, found.worst) == (n - 2, n - 1)
    assert found.readings == len(evaluator.requests) == calls_needed(n, schedule)
    assert found.margin > 0


def test_the_papers_numbers_of_calls():
    assert [calls_needed(5, s) for s in ("ordered", "unordered", "tournament")] == [20, 10, 12]
    assert calls_needed(1, "ordered") == 0


def test_scores_are_means_of_soft_wins_over_all_ordered_pairs():
    group = texts(4)
    evaluator = FakeJudge(bias=0.7)
    found = ranked(evaluator, group)
    judge = PairwiseJudge([FakeJudge(bias=0.7)], PROTOCOLS["refeval"])
    wins = {i: [] for i in range(4)}
    for i, j in combinations(range(4), 2):
        score = judge.judge([Comparison("Count.", group[i], group[j], (WORDS,))])[0].score
        wins[i].append(score)
        wins[j].append(1 - score)
    assert found.scores == pytest.approx([sum(w) / 3 for w in wins.values()])
    assert sum(found.scores) == pytest.approx(4 / 2)


def test_equal_texts_are_judged_once_and_share_their_score():
    evaluator = FakeJudge()
    found = ranked(evaluator, (texts(2)[0], texts(2)[1], texts(2)[0]))
    assert len(evaluator.requests) == 2
    assert found.scores[0] == found.scores[2] < found.scores[1]


def test_identical_or_single_candidates_need_no_call():
    evaluator = FakeJudge()
    assert ranked(evaluator, ("x", "x", "x")).scores == (None, None, None)
    assert ranked(evaluator, ("x",)).best is None
    assert not evaluator.requests


@pytest.mark.parametrize("schedule", ["ordered", "unordered"])
def test_a_candidate_that_cannot_be_judged_costs_itself_only(schedule):
    group = (*texts(4), "poison")
    found = ranked(FakeJudge(fail_on="poison"), group, schedule)
    assert found.scores[4] is None
    assert None not in found.scores[:4]
    assert (found.best, found.worst) == (3, 0)
    assert found.failures == {"timeout": calls_needed(5, schedule) - calls_needed(4, schedule)}


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 6),
    failing=st.sets(st.frozensets(st.integers(0, 5), min_size=2, max_size=2), max_size=8),
    schedule=st.sampled_from(["ordered", "unordered", "tournament"]),
)
def test_whatever_fails_scores_come_from_complete_comparisons(n, failing, schedule):
    group = texts(n)

    class Flaky(FakeJudge):
        def _one(self, request):
            parts = sections(text_of(request.context))
            shown = frozenset(len(parts[k].split()) - 1 for k in ("output_a", "output_b"))
            if shown in failing:
                return Answer.failed(Failure.TIMEOUT)
            return super()._one(request)

    found = ranked(Flaky(), group, schedule)
    known = [i for i, s in enumerate(found.scores) if s is not None]
    if schedule != "tournament":
        assert not any(frozenset(pair) in failing for pair in combinations(known, 2))
        assert known == sorted(known, key=lambda i: found.scores[i])  # the true order
        assert (found.best is None) == (len(known) < 2)
    for i in known:
        assert 0 <= found.scores[i] <= 1
    if found.best is not None:
        assert found.scores[found.best] >= found.scores[found.worst]


def test_a_failed_match_ends_a_tournament_without_a_pair_or_with_a_sound_one():
    found = ranked(FakeJudge(fail_on="poison"), (*texts(4), "poison"), "tournament")
    assert found.failures
    assert found.scores[4] is None
    if found.best is not None:
        assert found.scores[found.best] > found.scores[found.worst]


def test_everything_failed():
    found = ranked(FakeJudge(fail_on="Count"), texts(3))
    assert found.scores == (None, None, None) and found.best is None


def test_a_tie_has_no_best():
    found = ranked(FakeJudge(lambda o, i, r: 0.0, bias=1.0), texts(3))
    assert found.scores == pytest.approx((0.5, 0.5, 0.5))
    assert found.best is None or found.margin < 1e-12


@pytest.mark.parametrize("schedule", ["ordered", "tournament"])
def test_rounding_decides_no_tie(schedule):
    """Judges that only go by position: the mean of both orders is one half, but for rounding."""
    for seed in range(40):
        draw = Random(seed)
        judges = [FakeJudge(lambda o, i, r: 0.0, bias=draw.uniform(-2, 2), name=f"{k}") for k in range(3)]
        judge = PairwiseJudge(judges, PROTOCOLS["base"], weights=[0.2, 0.3, 0.5])
        assert judge.judge([Comparison("Count.", "x", "y")])[0].score == 0.5
        found = rank([Candidates("Count.", texts(5), (), "0")], judge, schedule, seed=seed)[0]
        assert found.best is None and choose(texts(5), found, lengths=[1] * 5, max_tokens=9) == "tie"
    scores = Ranking((0.5 + 1e-12, 0.5, 0.5), 0, 2)
    assert choose(texts(3), scores, lengths=[1] * 3, max_tokens=9) == "tie"


def test_random_orders_are_fixed_by_the_seed_and_differ_between_prompts():
    def orders(key: str, seed: int) -> list[str]:
        evaluator = FakeJudge()
        judge = PairwiseJudge([evaluator], PROTOCOLS["base"])
        rank([Candidates("Count.", texts(6), (), key)], judge, "unordered", seed=seed)
        return [r.context[0]["content"] for r in evaluator.requests]

    assert orders("a", 0) == orders("a", 0)
    assert orders("a", 0) != orders("b", 0)
    assert orders("a", 0) != orders("a", 1)


def test_what_the_judge_reads_of_a_prompt():
    assert instruction_text("Do it.") == "Do it."
    system = {"role": "system", "content": "Be brief."}
    assert instruction_text([system, {"role": "user", "content": "Do it."}]) == "Do it."
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert instruction_text(turns) == "User: a\n\nAssistant: b\n\nUser: c"


def test_a_local_judge_computes_instruction_and_reference_once(tiny_dir):
    from rlme.evaluators.local import LocalEvaluator
    from rlme.models import load_model, load_tokenizer

    model, tokenizer = load_model(tiny_dir), load_tokenizer(tiny_dir)
    group = [Candidates("Name " + "a number . " * 5, texts(4), (WORDS,), "0")]
    found, computed = [], []
    for share in (True, False):
        evaluator = LocalEvaluator(model, tokenizer, share=share)
        judge = PairwiseJudge([evaluator], PROTOCOLS["refeval"])
        found.append(rank(group, judge, "ordered")[0])
        computed.append(evaluator.tokens_computed)
    assert found[0].scores == pytest.approx(found[1].scores, abs=1e-4)
    assert found[0].readings == 12
    assert computed[0] < 0.4 * computed[1]


# pairs


def test_choosing_a_pair():
    def chosen(scores, lengths=(1, 1, 1), group=("a", "b", "c"), **options):
        known = {i: s for i, s in enumerate(scores) if s is not None}
        best = max(known, key=known.get) if known else None
        worst = min(known, key=known.get) if known else None
        if known and known[best] == known[worst]:
            best = worst = None
        return choose(group, Ranking(tuple(scores), best, worst), lengths=lengths, max_tokens=10, **options)

    assert chosen((0.2, 0.9, 0.5)) == (1, 0)
    assert chosen((0.2, 0.9, 0.5), lengths=(1, 11, 1)) == (2, 0)
    assert chosen((0.2, 0.9, 0.5), lengths=(11, 11, 1)) == "too long"
    assert chosen((0.5, 0.5, 0.5)) == "tie"
    assert chosen((0.5, 0.9, 0.5), lengths=(1, 11, 1)) == "tie"
    assert chosen((0.2, None, None)) == "failed judgements"
    assert chosen((0.2, 0.3, None), min_margin=0.2) == "margin too small"
    assert chosen((None, None, None), group=("a", "a", "a")) == "identical candidates"
    assert chosen((None,), group=("a",)) == "one candidate"


def test_no_pair_left_is_said_before_dpo():
    with pytest.raises(InputError, match=r"no preference pair is left \(3 tie, 1 too long\), so DPO has nothing"):
        require_pairs([], {"tie": 3, "too long": 1})
    require_pairs([Pair("p", "a", "b", 0.9, 0.1, 0)], {})


# the bridge

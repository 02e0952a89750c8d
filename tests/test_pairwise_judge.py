"""Pairwise judges: orders, references, failures, labels, the length rule, protocols."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rlme.align.judge import CUT_MARK, Comparison, PairwiseJudge, choice
from rlme.align.protocols import PROTOCOLS, load_protocol
from rlme.errors import InputError
from rlme.judgement import Answer, Failure, Request
from tests.fake_judge import FakeJudge, sections, text_of

PAIR = Comparison("Name the capital of France.", "It is Paris .", "It is Lyon .", ("Paris is it .",))


def judge_one(evaluator: FakeJudge, name: str = "refeval", comparison: Comparison = PAIR, **options):
    return PairwiseJudge([evaluator], PROTOCOLS[name], **options).judge([comparison])[0]


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize("chat", [True, False])
def test_every_protocol_prefers_the_output_like_the_reference_in_both_orders(name, chat):
    def paris(output: str, instruction: str, reference: str) -> float:
        assert instruction == PAIR.instruction
        assert reference == ("Paris is it ." if PROTOCOLS[name].needs_reference else "")
        return float("Paris" in output)

    evaluator = FakeJudge(paris, chat=chat)
    verdict = judge_one(evaluator, name)
    assert verdict.given == pytest.approx(verdict.swapped) == pytest.approx(1 / (1 + math.exp(-4)))
    assert [r.swapped for r in verdict.readings] == [False, True]
    for request, reading in zip(evaluator.requests, verdict.readings, strict=True):
        end = text_of(request.context) + request.prefill
        assert end.endswith("Output (")
        shown = sections(text_of(request.context))
        assert shown["output_a"] == (PAIR.second if reading.swapped else PAIR.first)
        assert request.continuations == ("a", "A", "b", "B")  # those the evaluator can spell


def test_score_is_the_softmax_over_the_two_labels_and_mass_their_sum():
    verdict = judge_one(FakeJudge(lambda o, i, r: 0.0, bias=1.0, mass=0.4))
    p = 1 / (1 + math.exp(-1))
    assert verdict.given == pytest.approx(p)
    assert verdict.swapped == pytest.approx(1 - p)  # the same bias towards what is shown first
    assert verdict.score == pytest.approx(0.5)
    assert verdict.readings[0].mass == pytest.approx(0.4)
    assert verdict.readings[0].logprobs == pytest.approx((math.log(0.4 * p), math.log(0.4 * (1 - p))))


def test_several_references_are_averaged_or_vote():
    several = Comparison(PAIR.instruction, PAIR.first, PAIR.second, ("Paris", "Lyon", "Lyon ."))
    mean = judge_one(FakeJudge(), comparison=several)
    vote = judge_one(FakeJudge(), comparison=several, vote=True)
    each = [judge_one(FakeJudge(), comparison=replace(PAIR, references=(r,))).score for r in several.references]
    assert mean.score == pytest.approx(sum(each) / 3)
    assert len(mean.readings) == 6
    assert vote.score == pytest.approx(1 / 3)
    assert choice(vote.score) == 2


def test_an_ensemble_is_a_weighted_mean():
    sure, unsure = FakeJudge(name="sure"), FakeJudge(sharpness=0.0, name="unsure")
    judge = PairwiseJudge([sure, unsure], PROTOCOLS["refeval"], weights=[3, 1])
    verdict = judge.judge([PAIR])[0]
    assert verdict.score == pytest.approx(0.75 * judge_one(sure).score + 0.25 * 0.5)
    assert judge.calls([PAIR]) == len(verdict.readings) == 4
    assert judge.calls([PAIR], orders="given") == 2


def test_one_order_only():
    verdict = PairwiseJudge([FakeJudge()], PROTOCOLS["base"]).judge([PAIR], orders="given")[0]
    assert verdict.swapped is None
    assert verdict.score == verdict.given


def test_a_failed_reading_leaves_no_score_and_is_counted():
    bad = Comparison("Poison.", "x", "y", ("x",))
    verdicts = PairwiseJudge([FakeJudge(fail_on="Poison")], PROTOCOLS["refeval"]).judge([PAIR, bad])
    assert verdicts[0].score is not None
    assert verdicts[1].score is None
    assert verdicts[1].failures == {"timeout": 2}
    assert choice(verdicts[1].score) is None


def test_a_label_whose_log_probability_was_not_returned_is_a_failure_not_a_half():
    verdict = judge_one(FakeJudge(missing_on="France"))
    assert verdict.score is None
    assert verdict.failures == {"label_missing": 2}


def test_nan_is_a_failure():
    class Broken(FakeJudge):
        def _one(self, request: Request) -> Answer:
            return Answer((math.nan,) * len(request.continuations))

    assert judge_one(Broken()).failures == {"not_a_number": 2}


def test_one_missing_reference_reading_makes_the_verdict_missing():
    verdict = judge_one(
        FakeJudge(fail_on="Marseille"),
        comparison=Comparison(PAIR.instruction, PAIR.first, PAIR.second, ("Paris", "Marseille")),
    )
    assert verdict.score is None
    assert verdict.failures == {"timeout": 2}


def test_reasons_come_first_and_what_they_conclude_is_not_read():
    evaluator = FakeJudge(lambda o, i, r: float("Paris" in o))
    verdict = judge_one(evaluator, "cot")
    assert verdict.readings[0].critique == "Both have merits."
    assert evaluator.requests[0].prefill == "Both have merits.\n\nTherefore, the better output is Output ("
    assert choice(verdict.score) == 1
    text = FakeJudge(chat=False)
    judge_one(text, "cot")
    assert text.requests[0].context.endswith(evaluator.requests[0].prefill)


def test_long_texts_are_shortened_alike_and_instruction_and_question_stay():
    long = Comparison("Say something.", "good " * 400, "bad " * 100, ("good " * 300,))
    limit = 350
    evaluator = FakeJudge()
    verdict = judge_one(evaluator, comparison=long, max_tokens=limit)
    assert verdict.shortened and verdict.score is not None
    for request in evaluator.requests:
        prompt = text_of(request.context)
        assert limit - 5 < evaluator.count_tokens(request.context) <= limit
        assert "Say something." in prompt and prompt.endswith("nothing else.")
        shown = sections(prompt)
        long_ones = [shown["reference"], max(shown["output_a"], shown["output_b"], key=len)]
        assert all(text.endswith(CUT_MARK) for text in long_ones)
        assert len({len(text) for text in long_ones}) == 1
    assert not judge_one(evaluator, max_tokens=10_000).shortened


def test_long_prompts_are_refused_when_told_so_or_when_nothing_fits():
    long = Comparison("Say something.", "good " * 400, "bad " * 100, ("good",))
    evaluator = FakeJudge()
    refused = judge_one(evaluator, comparison=long, max_tokens=350, too_long="refuse")
    assert refused.failures == {"context_too_long": 2}
    assert judge_one(evaluator, comparison=long, max_tokens=100).failures == {"context_too_long": 2}
    assert not evaluator.requests  # a refused prompt is not sent


def test_a_missing_reference_is_one_clear_sentence():
    with pytest.raises(InputError, match=r"'refeval' shows .* but comparison 1 has none"):
        judge = PairwiseJudge([FakeJudge()], PROTOCOLS["refeval"])
        judge.judge([PAIR, Comparison("Do it.", "x", "y", ("  ",))])


def test_labels_that_a_tokenizer_cannot_keep_apart():
    class Cannot(FakeJudge):
        def spellings(self, candidates):
            return tuple(c for c in candidates if c.lower().startswith("a"))

    with pytest.raises(InputError, match="evaluator 'fake' cannot be asked for the label 'b'"):
        PairwiseJudge([Cannot()], PROTOCOLS["base"])


def test_a_tokenizer_without_the_labels(tiny_word_dir):
    from rlme.evaluators.local import LocalEvaluator
    from rlme.models import load_model, load_tokenizer

    evaluator = LocalEvaluator(load_model(tiny_word_dir), load_tokenizer(tiny_word_dir), name="words")
    with pytest.raises(InputError, match=r"evaluator 'words' cannot be asked for the label 'a' .*'a', 'A'"):
        PairwiseJudge([evaluator], PROTOCOLS["base"])


@pytest.mark.parametrize("chat", [True, False])
def test_equals_the_softmax_of_the_letters_by_plain_transformers(tiny_dir, chat):
    import torch

    from rlme.evaluators.local import LocalEvaluator
    from rlme.models import load_model, load_tokenizer
    from rlme.templating import render

    model, tokenizer = load_model(tiny_dir), load_tokenizer(tiny_dir)
    judge = PairwiseJudge([LocalEvaluator(model, tokenizer, chat=chat)], PROTOCOLS["refmatch"])
    verdict = judge.judge([PAIR])[0]
    shown = {"instruction": PAIR.instruction, "reference": PAIR.references[0]}
    for reading, (a, b) in zip(verdict.readings, [(PAIR.first, PAIR.second), (PAIR.second, PAIR.first)], strict=True):
        prompt = render(PROTOCOLS["refmatch"].template, shown | {"output_a": a, "output_b": b}, where="test")
        if chat:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "Output ("
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt + "\n\nAnswer: Output (")["input_ids"]
        with torch.no_grad():
            p = model(torch.tensor([ids], device=model.device)).logits[0, -1].double().softmax(-1)
        letters = {c: float(p[tokenizer(c, add_special_tokens=False)["input_ids"][0]]) for c in "aAbB"}
        p_a, p_b = letters["a"] + letters["A"], letters["b"] + letters["B"]
        expected = p_a / (p_a + p_b)
        assert reading.p_first == pytest.approx(1 - expected if reading.swapped else expected, abs=1e-4)
        assert reading.mass == pytest.approx(p_a + p_b, rel=1e-3)


def test_weights_must_fit():
    with pytest.raises(InputError, match="one positive number for each of 1 evaluators"):
        PairwiseJudge([FakeJudge()], PROTOCOLS["base"], weights=[1, 2])


def test_unknown_protocol():
    with pytest.raises(InputError, match=r"unknown judging protocol 'refevil' \(did you mean 'refeval'\?\)"):
        load_protocol("refevil")


def test_own_template(tmp_path: Path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ instruction }}\n\n# Output (a)\n{{ output_a }}\n\n# Output (b)\n{{ output_b }}\n")
    assert not load_protocol(str(own)).needs_reference
    own.write_text("{{ instruction }} {{ output_a }}")
    with pytest.raises(InputError, match=r"does not show \{\{ output_b \}\}"):
        load_protocol(str(own))
    own.write_text("{{ output_a }} {{ output_b }} {{ referenc }}")
    with pytest.raises(InputError, match=r"uses 'referenc', .*did you mean 'reference'"):
        load_protocol(str(own))
    with pytest.raises(InputError, match="cannot be read"):
        load_protocol(str(tmp_path / "none.jinja"))


def test_own_protocol_with_other_labels(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text("template: '{{ output_a }} or {{ output_b }}?'\nlabels: [one, two]\n")
    protocol = load_protocol(str(own))
    assert protocol.labels == (("one",), ("two",)) and protocol.prefill == ""
    own.write_text("template: '{{ output_a }} or {{ output_b }}?'\nlabels: [one, one]\n")
    with pytest.raises(InputError, match="different, non-empty spellings"):
        load_protocol(str(own))
    own.write_text("template: '{{ output_a }} or {{ output_b }}?'\nlabel: [one, two]\n")
    with pytest.raises(InputError, match=r"unknown key 'label'; did you mean 'labels'\?"):
        load_protocol(str(own))


def test_both_labels_keep_the_same_number_of_spellings():
    class Lopsided(FakeJudge):
        def spellings(self, candidates):
            return tuple(c for c in candidates if c in ("a", "A", "b"))

    evaluator = Lopsided(lambda o, i, r: 0.0)
    judge_one(evaluator)
    assert evaluator.requests[0].continuations == ("a", "b")


def test_failure_kinds_are_the_evaluators_own():
    verdict = judge_one(FakeJudge(fail_on="France"))
    assert verdict.readings[0].failure is Failure.TIMEOUT
    assert verdict.readings[0].detail == "asked to fail"

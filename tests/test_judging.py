"""Questions, templates and read-outs, asked of real (tiny) models and checked against full logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlme import (
    Failure,
    InputError,
    Judging,
    LocalEvaluator,
    Question,
    Request,
    Sample,
    Template,
    judge,
    load_model,
    load_tokenizer,
)
from rlme.questions import READOUTS, log_sum_exp


@pytest.fixture(scope="module")
def chat(tiny_policy_dir: Path) -> LocalEvaluator:
    return LocalEvaluator(load_model(str(tiny_policy_dir)), load_tokenizer(str(tiny_policy_dir)), name="chat")


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> LocalEvaluator:
    return LocalEvaluator(load_model(str(tiny_base_dir)), load_tokenizer(str(tiny_base_dir)), name="base")


SAMPLES = [
    Sample(
        "What is 1 plus 2?", "It is 3.", context="What is 1 plus 2?", answer="3", n_tokens=4, columns={"topic": "sums"}
    ),
    Sample(
        "What is 1 plus 2?",
        "It is four, I think.",
        context="What is 1 plus 2?",
        answer="",
        n_tokens=7,
        columns={"topic": "sums"},
    ),
    Sample("Say hello.", "", context="Say hello.", columns={"topic": "greetings"}),
]


class Recording:
    """An evaluator that keeps its requests."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.requests = inner, []
        self.name, self.chat = inner.name, inner.chat
        self.spellings = inner.spellings

    def logprobs(self, requests: Any) -> Any:
        self.requests += list(requests)
        return self.inner.logprobs(requests)

    def write(self, requests: Any, *, max_tokens: int) -> Any:
        self.requests += list(requests)
        return self.inner.write(requests, max_tokens=max_tokens)

    def count_tokens(self, context: Any) -> Any:
        return self.inner.count_tokens(context)


def logp(evaluator: LocalEvaluator, context: str, continuation: str) -> float:
    """log p(continuation | context) from full logits."""
    tokenizer = evaluator.tokenizer
    ids = tokenizer(context)["input_ids"]
    rest = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with evaluator._model() as model, torch.no_grad():
        rows = model(torch.tensor([ids + rest], device=model.device)).logits[0].log_softmax(-1)
    return sum(rows[len(ids) - 1 + i, t].item() for i, t in enumerate(rest))


def test_marker_is_the_papers_sum_of_log_probs_not_renormalised(base: LocalEvaluator) -> None:
    recording = Recording(base)
    (judgement,), *_ = judge(SAMPLES, [Question("Is the answer correct?", "q")], [recording])
    context = recording.requests[0].context
    assert context.startswith("What is 1 plus 2?It is 3.") and context.endswith("Is the answer correct?\nResponse: ø")
    assert "the extracted answer is 3" in context and "it has 8 characters" in context
    assert "the extracted answer is missing" in recording.requests[1].context
    assert "extracted answer" not in recording.requests[2].context  # nothing is extracted there
    yes, no = logp(base, context, "YESø"), logp(base, context, "NOø")
    assert judgement.score == pytest.approx(yes, abs=1e-4)
    assert judgement.probability == pytest.approx(math.exp(yes), rel=1e-3)
    assert judgement.logprobs == {"YES": pytest.approx(yes, abs=1e-4), "NO": pytest.approx(no, abs=1e-4)}
    assert judgement.mass == pytest.approx(math.exp(yes) + math.exp(no), rel=1e-3)


def test_yes_no_sums_spelling_variants(base: LocalEvaluator) -> None:
    recording = Recording(base)
    (judgement,), *_ = judge(
        SAMPLES[:1], [Question("Is it?", "q", target="NO")], [recording], Judging("reply", "yes_no")
    )
    context = recording.requests[0].context
    asked = recording.requests[0].continuations
    assert {"Yes", " Yes", "YES"} <= set(asked)
    yes = log_sum_exp([logp(base, context, s) for s in asked if s.strip().lower() == "yes"])
    no = log_sum_exp([logp(base, context, s) for s in asked if s.strip().lower() == "no"])
    assert judgement.score == pytest.approx(no - log_sum_exp([yes, no]), abs=1e-4)
    assert judgement.mass == pytest.approx(math.exp(yes) + math.exp(no), rel=1e-3)


def test_scale_is_the_expected_rating(base: LocalEvaluator) -> None:
    recording = Recording(base)
    judgements = judge(SAMPLES[:1], [Question("Is it?", "q")], [recording], Judging("reply", "scale"))
    context = recording.requests[0].context
    weights = [
        math.exp(log_sum_exp([logp(base, context, s) for s in (str(k), f" {k}") if s in base.spellings([s])]))
        for k in range(5)
    ]
    expected = sum(k * w for k, w in enumerate(weights)) / sum(weights)
    assert judgements[0][0].score == pytest.approx(expected, abs=1e-3)
    assert judgements[0][0].probability == pytest.approx(expected / 4, abs=1e-3)
    low, high = READOUTS["scale"].score({str(k): math.log(0.2) for k in range(5)}, "YES")
    assert low == pytest.approx(2.0) and high == pytest.approx(0.5)


@pytest.mark.parametrize("readout", ["yes_no", "marker"])
def test_answers_of_ones_own(base: LocalEvaluator, readout: Any) -> None:
    recording = Recording(base)
    labels = ("good", "fair", "bad")
    question = Question("How is it?", "q", target="FAIR", labels=labels)
    (judgement,), *_ = judge(SAMPLES[:1], [question], [recording], Judging("reply", readout))
    context = recording.requests[0].context
    asked = recording.requests[0].continuations
    mark = "ø" if readout == "marker" else ""
    assert f"({mark}good{mark}, {mark}fair{mark} or {mark}bad{mark})" in context
    assert "Yes" not in context and not any("yes" in spelling.lower() for spelling in asked)
    values = {
        label: log_sum_exp([logp(base, context, s) for s in asked if s.strip(" ø").lower() == label])
        for label in labels
    }
    total = log_sum_exp(list(values.values()))
    expected = values["fair"] - (0.0 if readout == "marker" else total)
    assert question.target == "fair"
    assert judgement.score == pytest.approx(expected, abs=1e-4)
    assert judgement.logprobs == pytest.approx(values, abs=1e-4)
    assert judgement.mass == pytest.approx(math.exp(total), rel=1e-3)


def test_reason_writes_first_and_reads_then(chat: LocalEvaluator) -> None:
    recording = Recording(chat)
    judging = Judging("chat", "reason", reason_tokens=5, reason_then="yes_no")
    (judgement,), *_ = judge(SAMPLES[:2], [Question("Is it?", "q")], [recording], judging)
    first, last = recording.requests[0], recording.requests[-1]
    assert judgement.critique is not None and judgement.score is not None
    assert len(last.context) == len(first.context) + 2  # the critique and the call for the verdict
    text = judge(
        SAMPLES[:1],
        [Question("Is it?", "q")],
        [chat],
        Judging("reply", "reason", reason_tokens=5, reason_then="marker"),
    )
    assert text[0][0].score is not None and text[0][0].critique is not None


def test_chat_asks_the_next_turn(chat: LocalEvaluator) -> None:
    recording = Recording(chat)
    judge(SAMPLES[:1], [Question("Is the answer correct?", "q")], [recording])
    roles = [m["role"] for m in recording.requests[0].context]
    assert roles == ["user", "assistant", "user"]
    assert recording.requests[0].context[1]["content"] == "It is 3."
    assert "Is the answer correct?" in recording.requests[0].context[2]["content"]


def test_marker_in_chat_is_prefilled(chat: LocalEvaluator) -> None:
    recording = Recording(chat)
    judge(SAMPLES[:1], [Question("Is it?", "q", readout="marker")], [recording])
    assert recording.requests[0].prefill == "ø"
    text = chat.tokenizer.apply_chat_template(
        list(recording.requests[0].context), tokenize=False, add_generation_prompt=True
    )
    answer = chat.logprobs(recording.requests)[0]
    assert answer.logprobs is not None
    assert answer.logprobs[0] == pytest.approx(logp(chat, text + "ø", "YESø"), abs=1e-4)


def test_joint_asks_the_second_question_after_the_firsts_target(base: LocalEvaluator) -> None:
    questions = [Question("Is it correct?", "a"), Question("Is it {{ n_chars }} long?", "b")]
    recording = Recording(base)
    rows = judge(SAMPLES[:1], questions, [recording], Judging(joint=True))
    first, second = (r.context for r in recording.requests)
    assert second.startswith(first + "YESø") and second.endswith("Is it 8 long?\nResponse: ø")
    assert rows[0][1].score == pytest.approx(logp(base, second, "YESø"), abs=1e-4)
    separate = judge(SAMPLES[:1], questions, [base])
    assert separate[0][1].score != pytest.approx(rows[0][1].score, abs=1e-6)


def test_custom_templates_see_everything_but_gold(base: LocalEvaluator) -> None:
    names = ("prompt", "completion", "answer", "n_chars", "n_words", "n_tokens", "topic", "question")
    template = Template("text", " | ".join(f"{name}={{{{ {name} }}}}" for name in names))
    recording = Recording(base)
    judge(SAMPLES[:1], [Question("Ask?", "q", template=template)], [recording], Judging(readout="yes_no"))
    assert recording.requests[0].context == (
        "prompt=What is 1 plus 2? | completion=It is 3. | answer=3 | n_chars=8 | n_words=3 | n_tokens=4 | "
        "topic=sums | question=Ask?"
    )


def test_anchor_shows_the_true_answer_only_where_it_is_allowed(base: LocalEvaluator) -> None:
    anchored = Sample("What is 1 plus 2?", "It is 4.", context="c", answer="4", anchor="3")
    recording = Recording(base)
    judge([anchored, SAMPLES[0]], [Question("Is it?", "q")], [recording])
    shown, hidden = (r.context for r in recording.requests)
    assert "The correct answer is 3." in shown and "The correct answer" not in hidden


def test_several_evaluators_come_in_order(base: LocalEvaluator, chat: LocalEvaluator) -> None:
    rows = judge(SAMPLES, [Question("A?", "a"), Question("B?", "b")], [base, chat], Judging("reply"))
    assert [[(j.evaluator, j.question) for j in row] for row in rows] == [
        [("base", "a"), ("base", "b"), ("chat", "a"), ("chat", "b")]
    ] * 3


def test_a_context_too_long_is_a_failure_never_cut(base: LocalEvaluator) -> None:
    short = LocalEvaluator(base._model, base.tokenizer, name="short", max_context_tokens=60)
    long = Sample("What?", "word " * 200, context="What?")
    (good,), (bad,) = judge([SAMPLES[0], long], [Question("Is it?", "q")], [short], Judging("reply", "marker"))
    assert good.score is not None
    assert bad.failure is Failure.CONTEXT_TOO_LONG and bad.score is None and bad.mass is None


def test_nan_is_a_failure(base: LocalEvaluator, tiny_base_dir: Path) -> None:
    broken = load_model(str(tiny_base_dir))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    (judgement,), *_ = judge(SAMPLES[:1], [Question("Is it?", "q")], [LocalEvaluator(broken, base.tokenizer)])
    assert judgement.failure is Failure.NOT_A_NUMBER and judgement.score is None


def test_spellings_leave_out_what_contains_another(base: LocalEvaluator) -> None:
    assert base.spellings(["Yes", "Yes, it is", " Yes"]) == ("Yes", " Yes")


def test_a_tokenizer_that_cannot_spell_says_so(tiny_word_dir: Path) -> None:
    words = LocalEvaluator(load_model(str(tiny_word_dir)), load_tokenizer(str(tiny_word_dir)), name="words")
    with pytest.raises(InputError, match=r"words.*'YES'"):
        judge(SAMPLES[:1], [Question("Is it?", "q")], [words])


def test_identical_completions_and_prompts_are_judged_once(base: LocalEvaluator) -> None:
    one = LocalEvaluator(base._model, base.tokenizer)
    judge([SAMPLES[0]], [Question("Is it?", "q")], [one])
    six = LocalEvaluator(base._model, base.tokenizer)
    rows = judge([SAMPLES[0]] * 6, [Question("Is it?", "q")], [six])
    assert six.tokens_computed == one.tokens_computed
    assert len({row[0].score for row in rows}) == 1


def test_shared_and_plain_agree(tiny_dir: Path) -> None:
    model, tokenizer = load_model(str(tiny_dir)), load_tokenizer(str(tiny_dir))
    questions = [Question("Is the answer correct?", "a"), Question("Is it short?", "b", readout="scale")]
    shared, plain = (
        judge(SAMPLES, questions, [LocalEvaluator(model, tokenizer, share=share)]) for share in (True, False)
    )
    for a, b in zip(shared, plain, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


def test_request_is_plain_data() -> None:
    assert Request("text", ("Yes",)) == Request("text", ("Yes",))


def test_joint_shows_each_question_with_its_own_answers(base: LocalEvaluator) -> None:
    questions = [
        Question("How is it?", "tone", labels=("fair", "poor"), target="poor", readout="yes_no"),
        Question("How good is it?", "good", readout="scale"),
        Question("Is it short?", "short", readout="yes_no"),
    ]
    recording = Recording(base)
    judge(SAMPLES[:1], questions, [recording], Judging("reply", joint=True))
    last = str(recording.requests[-1].context)
    assert "How is it? (fair or poor)\nAnswer: poor\n" in last
    assert "How good is it? (a whole number from 0 (not at all) to 4 (fully))\nAnswer: 4\n" in last
    assert last.endswith("Is it short? (Yes or No)\nAnswer:")

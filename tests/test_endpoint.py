"""Endpoint evaluators: exact numbers over HTTP for every kind of server, and refusals that say what to do."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from pydantic import ValidationError

from rlme.errors import InputError, RunStopped
from rlme.evaluators import endpoint_probe, endpoint_tokens
from rlme.evaluators.base import Evaluator
from rlme.evaluators.endpoint import EndpointEvaluator, families
from rlme.evaluators.endpoint_config import EndpointConfig, Prices
from rlme.evaluators.endpoint_tokens import TokenServer
from rlme.evaluators.endpoint_wire import CallFailed, NextTokens, read_named_tokens
from rlme.judgement import Failure, Message, Request
from rlme.judging import Judging
from rlme.reward import MetaReward, judgement_metrics
from tests import fake_endpoint as fake

LABELS = ("YES", "Yes", " yes", "NO", "No", " no")


def ask(text: str, *labels: str, prefill: str = "") -> Request:
    return Request(text, labels or LABELS, prefill)


def chat(text: str, *labels: str, prefill: str = "") -> Request:
    message: Message = {"role": "user", "content": text}
    return Request((message,), labels or LABELS, prefill)


def evaluator(server: Any, **config: Any) -> EndpointEvaluator:
    return EndpointEvaluator(EndpointConfig(base_url=server.url, **config))


@pytest.fixture(params=["vllm_ids", "llama", "sglang"])
def token_server(request: pytest.FixtureRequest) -> Iterator[Any]:
    with fake.fake_endpoint(request.param) as server:
        yield server


def asked(server: Any) -> int:
    """Calls for an answer or a text."""
    return int(server.calls["/v1/completions"] + server.calls["/generate"])


def truth(request: Request) -> list[float]:
    context = request.context
    text = context if isinstance(context, str) else fake.render(context)
    return [fake.true_logprob(text + request.prefill, c) for c in request.continuations]


def test_exact_ids_text_chat_prefill_and_labels_of_several_tokens(token_server: Any) -> None:
    judge = evaluator(token_server)
    assert isinstance(judge, Evaluator) and judge.chat
    requests = [
        ask("Is it right? Response: ø", "YESø", "NOø"),
        chat("Is it right?"),
        chat("Is it right?", "YESø", "NOø", "maybe", prefill="ø"),
        ask("Rate it:", "10", "12", "1x"),
    ]
    for request, answer in zip(requests, judge.logprobs(requests), strict=True):
        assert answer.failure is None and not answer.bounded
        assert answer.logprobs == pytest.approx(truth(request), abs=1e-12)
        assert answer.tokens_in > 0 and answer.tokens_out >= 1
    judge.close()


def test_labels_share_the_calls_of_their_common_beginning(token_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_tokens, "FIRST_TOP", 1000)
    judge = evaluator(token_server)
    before = asked(token_server)
    judge.logprobs([ask("Rate it:", "10", "12", "1x")])  # 1 -> {0, 2, x}: two calls, not three times two
    assert asked(token_server) - before == 2
    judge.close()


def test_order_of_answers_is_the_order_of_requests_whatever_the_timing(token_server: Any) -> None:
    judge = evaluator(token_server, concurrency=16)
    token_server.delay = 0.02
    requests = [ask(f"Question {i}?") for i in range(100)]
    for request, answer in zip(requests, judge.logprobs(requests), strict=True):
        assert answer.logprobs == pytest.approx(truth(request))
    assert 2 <= token_server.most_active <= 16
    judge.close()


def test_families_share_a_beginning_and_leave_nobody_idle() -> None:
    requests = [
        ask(f"{'long text ' * 20}{completion}{'tail ' * 30} question {q}?")
        for completion in range(64)
        for q in range(3)
    ]
    found = families(requests, 8)
    assert [i for family in found for i in family] == list(range(192))
    assert max(map(len, found)) == 6 and len(found) >= 4 * 8
    assert families(requests, 64) == [[i] for i in range(192)]
    assert families([ask("a"), ask("b")], 1) == [[0], [1]]
    unrelated = [ask(str(i) + "x" * 50) for i in range(40)]
    assert len(families(unrelated, 1)) > 30
    assert families([], 4) == []


def test_start_returns_at_once(token_server: Any) -> None:
    judge = evaluator(token_server, concurrency=2)
    token_server.delay = 0.4
    future = judge.start([ask(f"{i}?") for i in range(6)])
    assert not future.done()
    assert len(future.result()) == 6
    judge.close()
    judge.close()


def test_what_was_begun_is_not_asked_again(token_server: Any) -> None:
    judge = evaluator(token_server, concurrency=2)
    before = asked(token_server)
    requests = [ask("1?"), ask("2?"), ask("2?"), ask("3?"), chat("4?")]
    judge.begin(requests[:2])
    judge.begin([ask("x" * 500), requests[2]])
    judge.begin([requests[3]], max_tokens=4)
    texts = judge.write([requests[3], ask("5?")], max_tokens=4)
    answers = judge.logprobs([*requests[::-1], ask("x" * 500)])
    assert asked(token_server) - before == 2 + len(requests)
    for request, answer in zip(requests[::-1], answers, strict=False):
        assert answer.logprobs == pytest.approx(truth(request), abs=1e-12)
    assert answers[-1].failure is Failure.CONTEXT_TOO_LONG
    assert texts == judge.write([requests[3], ask("5?")], max_tokens=4)
    judge.close()


def test_what_was_begun_in_vain_is_called_off(token_server: Any) -> None:
    judge = evaluator(token_server, concurrency=1)
    before = asked(token_server)
    token_server.delay = 0.2
    judge.begin([ask(f"{i}?") for i in range(50)])
    assert judge.logprobs([ask("other?")])[0].failure is None
    assert asked(token_server) - before < 10
    judge.close()


def test_an_interrupt_cancels_the_calls(token_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = evaluator(token_server, concurrency=1)
    token_server.delay = 0.2
    wait = Future.result

    def interrupted(self: Any, timeout: float | None = None) -> Any:
        if not self.done():
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge.logprobs([ask(f"{i}?") for i in range(50)])
    monkeypatch.undo()
    time.sleep(0.6)
    assert asked(token_server) < 20
    judge.close()


def test_hosted_chat_takes_whole_tokens_only() -> None:
    with fake.fake_endpoint("hosted") as server:
        judge = evaluator(server)
        assert "one-token labels only, the 20 most likely" in judge.summary
        assert judge.spellings(["YES", "YESø", "No", "maybe"]) == ("YES", "No")
        assert judge.count_tokens("abc") is None
        request = chat("Is it right?", "YES", "NO")
        (answer,) = judge.logprobs([request])
        assert answer.logprobs == pytest.approx(truth(request))
        with pytest.raises(InputError, match="use the read-out yes_no"):
            judge.logprobs([chat("Is it right?", prefill="ø")])
        with pytest.raises(InputError, match="use a chat template"):
            judge.logprobs([ask("Is it right?")])
        judge.close()


def test_sglang_is_asked_by_token_id_on_its_own_route() -> None:
    with fake.fake_endpoint("sglang") as server:
        server.leading = "~"  # its tokenizer route puts the beginning of text before everything, labels as well
        judge = evaluator(server)
        assert "SGLang, chat and text, labels as exact token ids, log-probabilities of named tokens" in judge.summary
        requests = [ask("Is it right? ø", "YESø", "NOø", "^"), chat("Is it right?", "YESø", "NO", prefill="ø")]
        for request, answer in zip(requests, judge.logprobs(requests), strict=True):
            context = request.context if isinstance(request.context, str) else fake.render(request.context)
            text = f"~{context}{request.prefill}"
            assert answer.logprobs == pytest.approx([fake.true_logprob(text, c) for c in request.continuations])
            assert answer.tokens_cached > 0
        judge.close()
    with fake.fake_endpoint("sglang_old") as server:  # no messages, so no way to know the ids of a chat
        by_text, by_id = evaluator(server), evaluator(server, api="completions")
        assert "one-token labels only" in by_text.summary and by_text.chat
        assert "SGLang, text only" in by_id.summary
        assert by_id.logprobs([ask("Right?", "YESø")])[0].logprobs == pytest.approx(truth(ask("Right?", "YESø")))
        by_text.close()
        by_id.close()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ([], Failure.MALFORMED),
        ({"text": "Yes"}, Failure.MALFORMED),
        ({"meta_info": {}}, Failure.LABEL_MISSING),
        ({"meta_info": {"output_token_ids_logprobs": [None]}}, Failure.LABEL_MISSING),
        ({"meta_info": {"output_token_ids_logprobs": [[[-1.0, 5, None]], [[-1.0, 5, None]]]}}, Failure.MALFORMED),
        ({"meta_info": {"output_token_ids_logprobs": [[[-1.0, 5, None]]]}}, Failure.LABEL_MISSING),
        ({"meta_info": {"output_token_ids_logprobs": [[[-1.0, 5], [-3.4e38, 7]]]}}, Failure.LABEL_MISSING),
        ({"meta_info": {"output_token_ids_logprobs": [[[-1.0, 5], [None, 7]]]}}, Failure.NOT_A_NUMBER),
        ({"meta_info": {"output_token_ids_logprobs": [[[-1.0, 5], [math.nan, 7]]]}}, Failure.NOT_A_NUMBER),
        ({"meta_info": {"output_token_ids_logprobs": [[[-0.1, 5], [-0.1, 7]]]}}, Failure.MALFORMED),
        ({"meta_info": {"output_token_ids_logprobs": [[5, 7]]}}, Failure.MALFORMED),
        ({"meta_info": {"output_token_ids_logprobs": [{"5": -1}]}}, Failure.MALFORMED),
    ],
)
def test_nothing_of_sglangs_reply_is_believed_unchecked(reply: Any, kind: Failure) -> None:
    with pytest.raises(CallFailed) as failed:
        read_named_tokens(reply, [5, 7])
    assert failed.value.kind is kind


def test_legacy_completions_without_chat() -> None:
    with fake.fake_endpoint("legacy") as server:
        judge = evaluator(server, missing_label="bound")
        assert not judge.chat
        with pytest.raises(InputError, match="template of kind text"):
            judge.logprobs([chat("Is it right?")])
        request = ask("Is it right?", "YES", "NO")
        (answer,) = judge.logprobs([request])
        assert answer.logprobs is not None
        for value, true, bounded in zip(answer.logprobs, truth(request), answer.bounded or (False, False), strict=True):
            assert value >= true - 1e-9 if bounded else value == pytest.approx(true)
        judge.close()


def test_a_label_outside_the_list_is_a_failure_or_a_marked_bound() -> None:
    with fake.fake_endpoint("vllm") as server:  # top 20, no named ids
        failing, bounding = evaluator(server), evaluator(server, missing_label="bound")
        requests = [ask(f"Question {i}?", "YES", "~") for i in range(40)]
        pairs = list(zip(requests, failing.logprobs(requests), bounding.logprobs(requests), strict=True))
        assert {a.failure for _, a, _ in pairs} == {None, Failure.LABEL_MISSING}
        for request, strict, bound in pairs:
            assert bound.logprobs is not None
            if strict.failure is None:
                assert strict.logprobs == bound.logprobs == pytest.approx(truth(request))
            else:
                assert strict.logprobs is None and "not among" in strict.detail and any(bound.bounded)
                for value, true, bounded in zip(bound.logprobs, truth(request), bound.bounded, strict=True):
                    assert value > true if bounded else value == pytest.approx(true)
        failing.close()
        bounding.close()


def test_a_bounded_judgement_is_marked_in_the_rows_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_probe, "TOPS", (8,))
    with fake.fake_endpoint("vllm") as server:
        judge = evaluator(server, missing_label="bound")
        reward = MetaReward({"q": "Is it right?"}, [judge], judging=Judging("reply", "yes_no"))
        rewards = reward.score(["Why?"] * 80, [f"Because of {i}." for i in range(80)])
        marked = [row["judgements"][0]["bounded"] for row in reward.rows]
        assert None not in rewards and 0 < sum(marked) < 80
        assert judgement_metrics(reward.rows)["judge/tiny/q/bounded"] == sum(marked)
        exact = next(row for row, mark in zip(reward.rows, marked, strict=True) if not mark)
        failing = evaluator(server)
        same = MetaReward({"q": "Is it right?"}, [failing], judging=reward.judging)
        assert same.score(["Why?"], [exact["completion"]]) == [exact["reward"]]
        judge.close()
        failing.close()


def test_a_missing_spelling_is_no_missing_label_when_it_cannot_matter() -> None:
    with fake.fake_endpoint("vllm") as server:
        judge = evaluator(server)
        requests = [ask(f"Question {i}?") for i in range(60)]
        answers = judge.logprobs(requests)
        bounded = [(r, a) for r, a in zip(requests, answers, strict=True) if any(a.bounded)]
        for request, answer in bounded:
            assert answer.logprobs is not None
            for label in (slice(0, 3), slice(3, 6)):
                told = math.fsum(map(math.exp, answer.logprobs[label]))
                assert told == pytest.approx(math.fsum(map(math.exp, truth(request)[label])), rel=0.0101)
        judge.close()


def test_labels_beyond_the_first_list_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_tokens, "FIRST_TOP", 50)
    with fake.fake_endpoint("llama") as server:
        judge = evaluator(server)
        requests = [ask(f"Question {i}?", "~", "`", "^") for i in range(8)]
        for request, answer in zip(requests, judge.logprobs(requests), strict=True):
            assert answer.logprobs == pytest.approx(truth(request))
        assert any(body["logprobs"] == len(fake.VOCABULARY) for _, body in server.bodies if "logprobs" in body)
        judge.close()


def test_a_spelling_that_cannot_matter_is_not_asked_for_again() -> None:
    top = NextTokens({1: -0.1, 2: -4.0}, {}, floor=-14.0)
    assert endpoint_tokens._all_there(top, [[1, 7], [2, 8]])  # e^-14 beside e^-4
    assert not endpoint_tokens._all_there(top, [[1, 7], [8, 9]])  # a label without any spelling
    assert not endpoint_tokens._all_there(top, [[1, None]])  # a longer spelling that has to be followed
    assert not endpoint_tokens._all_there(NextTokens({1: -0.1}, {}, floor=-5.0), [[1, 7]])
    assert not endpoint_tokens._all_there(NextTokens({1: -0.1}, {}, floor=None), [[1, 7]])


def test_too_long_contexts_fail_and_are_never_cut(token_server: Any) -> None:
    judge = evaluator(token_server)
    short, long = judge.logprobs([ask("ok?"), ask("x" * 500)])
    assert short.failure is None
    assert long.failure is Failure.CONTEXT_TOO_LONG and long.logprobs is None
    token_server.cut_at = 50  # a server that cuts silently
    (cut,) = judge.logprobs([ask("x" * 80)])
    assert cut.failure is Failure.CONTEXT_TOO_LONG and "read 50 of 80" in cut.detail
    judge.close()


def test_context_limit_told_by_a_hosted_server() -> None:
    with fake.fake_endpoint("hosted") as server:
        judge = evaluator(server)
        (answer,) = judge.logprobs([chat("x" * 500, "YES")])
        assert answer.failure is Failure.CONTEXT_TOO_LONG
        judge.close()


def test_spellings_drop_what_begins_with_another(token_server: Any) -> None:
    judge = evaluator(token_server)
    assert judge.spellings(["YES", "YESø", "NO", "1", "12", "12"]) == ("YES", "NO", "1")
    assert judge.count_tokens("YES NO!") == 3
    judge.close()


def test_write_is_greedy_text(token_server: Any) -> None:
    judge = evaluator(token_server)
    short, long = judge.write([ask("Why?"), ask("x" * 500)], max_tokens=4)
    ids = fake.encode("Why?")
    for _ in range(4):
        row = fake.next_logprobs(ids)
        ids.append(row.index(max(row)))
    assert short == "".join(fake.VOCABULARY[i] for i in ids[4:])
    assert long is Failure.CONTEXT_TOO_LONG
    judge.close()


def test_what_a_server_cannot_do_is_refused_at_the_start() -> None:
    refusal = r"returns no log-probabilities.*use vLLM"
    with fake.fake_endpoint("none") as server, pytest.raises(InputError, match=refusal):
        evaluator(server)
    with fake.fake_endpoint("hosted") as server, pytest.raises(InputError, match="completions: HTTP 404"):
        evaluator(server, api="completions")
    with fake.fake_endpoint("llama", models=("a", "b")) as server:
        with pytest.raises(InputError, match=r"serves 2 models \('a', 'b'\)"):
            evaluator(server)
        with pytest.raises(InputError, match="does not serve the model 'c'; it serves 'a', 'b'"):
            evaluator(server, model="c")
    with pytest.raises(InputError, match="cannot be used"):
        EndpointEvaluator(EndpointConfig(base_url="http://127.0.0.1:9/v1", retries=0))


def test_keys_come_from_the_environment_and_only_where_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    with fake.fake_endpoint("llama", key="s3cret") as server:
        with pytest.raises(InputError, match=r"HTTP 401.*api_key_env") as error:
            evaluator(server)
        assert "of-another-service" not in str(error.value)
        with pytest.raises(InputError, match="'MY_KEY', which is not set"):
            evaluator(server, api_key_env="MY_KEY")
        monkeypatch.setenv("MY_KEY", "s3cret")
        judge = evaluator(server, api_key_env="MY_KEY")
        assert judge.logprobs([ask("ok?")])[0].failure is None
        assert "s3cret" not in repr(judge.config) + judge.identity + judge.summary
        judge.close()


def test_requests_per_minute_are_evenly_spaced() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, requests_per_minute=1200, concurrency=32)
        server.started.clear()
        judge.logprobs([ask(f"{i}?") for i in range(12)])
        calls = sum(path == "/v1/completions" for path, _ in server.bodies[-24:])
        assert calls >= 12 and server.started[-1] - server.started[0] >= 11 * 0.05 * 0.95
        judge.close()


def test_tokens_per_minute_hold_calls_back() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, tokens_per_minute=60_000)  # 1000 a second
        began = time.monotonic()
        judge.logprobs([ask(f"{i:099}", "YES") for i in range(6)])  # 6 x 100 tokens
        assert time.monotonic() - began > 0.45
        judge.close()


def test_cost_is_counted_and_capped() -> None:
    prices = Prices(input=10.0, cached_input=2.0, output=100.0)
    assert prices.cost(1_000_000, 500_000, 10_000) == pytest.approx(5 + 1 + 1)
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, prices=prices, max_cost=0.02)
        answers = judge.logprobs([ask(f"{i:099}", "YES") for i in range(5)])
        assert answers[0].cost == pytest.approx(prices.cost(99, 49, 1))
        assert judge.account.cost >= sum(a.cost for a in answers)
        with pytest.raises(RunStopped, match="max_cost"):
            judge.logprobs([ask(f"{i:099}", "YES") for i in range(50)])
        assert judge.account.cost <= 0.02
        judge.close()


def test_a_server_that_does_not_count_is_not_free() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        server.counts = False
        judge = evaluator(server, prices=Prices(input=10.0), max_cost=0.01)
        (answer,) = judge.logprobs([ask(f"{0:099}", "YES")])
        assert (answer.tokens_in, answer.tokens_cached, answer.tokens_out) == (99, 0, 1)
        with pytest.raises(RunStopped, match="max_cost"):
            judge.logprobs([ask(f"{i:099}", "YES") for i in range(50)])
        judge.close()


def test_tokens_are_estimated_before_they_are_spent(token_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = evaluator(token_server, prices=Prices(input=1.0))
    requests = [ask("Rate it:", "10", "12", "1x"), ask("Right?", "YES", "NO")]
    estimate = judge.estimate(requests)
    assert judge.account.cost < 1e-4
    assert (estimate.tokens_in, estimate.tokens_out) == (2 * 8 + 6, 3)
    answers = judge.logprobs(requests)
    assert sum(a.tokens_out for a in answers) == estimate.tokens_out
    if "llama" in judge.summary:  # it may have to be asked again for more alternatives
        monkeypatch.setattr(endpoint_tokens, "FIRST_TOP", 5)
        assert judge.estimate(requests).tokens_out == 6
    judge.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://me:pw@host/v1"},
        {"base_url": "http://host", "retries": -1},
        {"base_url": "http://host", "max_cost": 1.0},
        {"base_url": "http://host", "tempo": 1},
    ],
)
def test_bad_configuration(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EndpointConfig(**bad)


def test_calls_under_way_at_a_stop_are_booked() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, concurrency=4, prices=Prices(input=10.0))
        judge.logprobs([ask("spell")])  # labels are known now
        before, calls = judge.account.tokens_in, judge.account.calls
        server.delay = 0.5
        judge.begin([ask(f"{i}?") for i in range(4)])
        deadline = time.monotonic() + 5
        while judge.account.calls == calls and time.monotonic() < deadline:
            time.sleep(0.01)
        judge.call_off()
        assert judge.account.calls == calls + 1
        assert judge.account.tokens_in == before + len("0?") and judge.account._reserved == 0
        judge.close()


def test_what_was_answered_comes_with_the_stop() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, prices=Prices(input=10.0), max_cost=0.02, concurrency=1)
        requests = [ask(f"{i:099}", "YES") for i in range(50)]
        with pytest.raises(RunStopped, match="max_cost") as stopped:
            judge.logprobs(requests)
        answered = stopped.value.answered
        assert 0 < len(answered) < 50
        assert all(answer.logprobs is not None for answer in answered.values())
        judge.close()


def test_the_probe_counts_for_the_cap() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        config = EndpointConfig(base_url=server.url, prices=Prices(input=10.0), max_cost=0.01)
        with pytest.raises(RunStopped, match="max_cost"):
            EndpointEvaluator(config, spent_before=0.01)


def test_a_text_that_begins_like_every_text_does_so_once() -> None:
    """Of a template that writes the beginning itself, to a server that puts it before every text."""

    class Server(TokenServer):
        async def tokenize(self, text: str, *, special: bool) -> list[int]:
            found = [1 if token == "<s>" else ord(token) for token in re.findall("<s>|.", text)]
            return [1, *found] if special else found

    server = Server(None, "m", "vLLM", "http://x", True)  # type: ignore[arg-type]
    for text in ("<s>hi", "hi", "aab", "<s><s>hi"):
        expected = [1, *(ord(c) for c in text.replace("<s>", ""))]
        found = asyncio.run(server.encode(text, ""))
        assert found == (expected if not text.startswith("<s><s>") else [1, *expected])

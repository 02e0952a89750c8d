"""Judgements through a broken network: never a wrong number, every failure counted by its kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlme.errors import RunStopped
from rlme.evaluators import endpoint_client
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.evaluators.endpoint_client import EndpointClient
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.judgement import Answer, Failure, Request
from tests import fake_endpoint as fake

LABELS = ("YES", "NO", " yes", " no")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(endpoint_client, "LONGEST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with fake.fake_endpoint("vllm_ids") as server:
        yield server


def evaluator(url: str, **config: Any) -> EndpointEvaluator:
    config = {"retries": 20, "concurrency": 16, "deadline": 5.0} | config
    return EndpointEvaluator(EndpointConfig(base_url=url, **config))


def questions(n: int) -> list[Request]:
    return [Request(f"Reply {i}. Is it right? Response:", LABELS) for i in range(n)]


def right(request: Request, answer: Answer) -> bool:
    assert isinstance(request.context, str)
    true = [fake.true_logprob(request.context, label) for label in request.continuations]
    return answer.logprobs == pytest.approx(true, abs=1e-12)


def attempts(judge: EndpointEvaluator) -> dict[str, int]:
    return {kind.value: n for kind, n in judge.account.failures.items()}


def expected(injected: dict[str, int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for fault, n in injected.items():
        counts[fake.KIND[fault]] = counts.get(fake.KIND[fault], 0) + n
    return counts


@pytest.mark.parametrize("fault", fake.FAULTS)
def test_one_fault_retried_until_it_passes(server: Any, fault: str) -> None:
    slow = fault in ("timeout", "slow_drip")
    n = 150 if slow else 250
    with fake.faulty_proxy(server.url, rate=0.3) as proxy:
        judge = evaluator(proxy.url, deadline=0.25 if slow else 5.0)
        judge.logprobs(questions(1))
        judge.account.failures.clear()  # a machine under load may be late at the start
        proxy.faults[:] = [fault]
        requests = questions(n)
        answers = judge.logprobs(requests)
        assert all(right(r, a) for r, a in zip(requests, answers, strict=True))
        assert proxy.injected[fault] > n / 8
        if slow:
            assert set(attempts(judge)) == {"timeout"} and attempts(judge)["timeout"] >= proxy.injected[fault]
        else:
            assert attempts(judge) == expected(proxy.injected)
        judge.close()


def test_all_faults_mixed_and_too_few_retries_give_failures_never_numbers(server: Any) -> None:
    with fake.faulty_proxy(server.url, rate=0.3, seed=1) as proxy:
        judge = evaluator(proxy.url, deadline=1.0, retries=0)
        requests = questions(400)
        proxy.faults[:] = fake.FAULTS
        answers = judge.logprobs(requests)
        failed = [a for a in answers if a.failure is not None]
        assert 5 < len(failed) < 200
        assert all(a.logprobs is None and a.detail for a in failed)
        assert all(right(r, a) for r, a in zip(requests, answers, strict=True) if a.failure is None)
        assert {a.failure for a in failed} <= {Failure(kind) for kind in fake.KIND.values()}
        counted, injected = attempts(judge), expected(proxy.injected)
        counted.pop("timeout"), injected.pop("timeout")  # at this deadline a busy machine makes some of its own
        assert counted.keys() == injected.keys()
        # The few faults that no attempt saw hit health checks.
        assert all(0 <= injected[kind] - n <= 10 for kind, n in counted.items())

        proxy.faults.clear()  # the same questions once the faults are over
        judge.close()
        judge = evaluator(proxy.url)
        assert all(right(r, a) for r, a in zip(requests, judge.logprobs(requests), strict=True))
        judge.close()


def test_a_request_that_always_fails_is_not_an_outage(server: Any) -> None:
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, retries=2, outage=60)
        whole = judge._server._body  # type: ignore[union-attr]

        def poisoned(context: list[int], *, max_tokens: int) -> dict[str, Any]:
            return whole(context, max_tokens=max_tokens) | ({"model": None} if len(context) == 7 else {})

        judge._server._body = poisoned  # type: ignore[union-attr,method-assign]
        server_error = {"error": {"message": "CUDA error"}}
        route = fake._Fake._complete

        def complete(handler: Any, request: dict[str, Any], chat: bool) -> None:
            handler.reply(500, server_error) if request["model"] is None else route(handler, request, chat)

        fake._Fake._complete = complete  # type: ignore[method-assign]
        try:
            bad, good = judge.logprobs([Request("poison!", LABELS), Request("fine", LABELS)])
        finally:
            fake._Fake._complete = route  # type: ignore[method-assign]
        assert bad.failure is Failure.SERVER_ERROR and "CUDA error" in bad.detail
        assert good.failure is None
        judge.close()


def test_an_outage_is_waited_out(server: Any) -> None:
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, retries=1, outage=30)
        proxy.rate, proxy.faults[:] = 1.0, ["error_500", "cut_body"]
        requests = questions(40)
        future = judge.start(requests)
        time.sleep(0.6)
        assert not future.done()
        proxy.faults.clear()
        answers = future.result(timeout=20)
        assert all(right(r, a) for r, a in zip(requests, answers, strict=True))
        judge.close()


def test_an_outage_that_ends_before_the_health_check_is_no_fault_of_the_request(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    comes_back = True

    async def healthy(self: Any) -> bool:
        if comes_back:
            proxy.faults.clear()
        return True

    monkeypatch.setattr(EndpointClient, "_healthy", healthy)
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, retries=1, outage=30, concurrency=4)
        assert judge.logprobs(questions(1))[0].failure is None
        proxy.rate, proxy.faults[:] = 1.0, ["error_500"]
        requests = questions(12)
        answers = judge.logprobs(requests)
        assert [a.failure for a in answers] == [None] * len(answers), [a.detail for a in answers]
        assert all(right(r, a) for r, a in zip(requests, answers, strict=True))
        # Where the server was well all along, that is one attempt more.
        comes_back = False
        before = judge.account.failures[Failure.SERVER_ERROR]
        proxy.faults[:] = ["error_500"]
        assert judge.logprobs(questions(1))[0].failure is Failure.SERVER_ERROR
        assert judge.account.failures[Failure.SERVER_ERROR] - before == 3
        judge.close()


@pytest.mark.parametrize("fault", ["error_500", "rate_limit", "cut_body"])
def test_an_outage_longer_than_its_budget_stops_the_run(server: Any, fault: str) -> None:
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, retries=1, outage=0.5)
        proxy.rate, proxy.faults[:] = 1.0, [fault]
        began = time.monotonic()
        with pytest.raises(RunStopped, match="has not answered for"):
            judge.logprobs(questions(30))
        assert time.monotonic() - began < 5
        proxy.faults.clear()  # the evaluator itself is still usable
        assert judge.logprobs(questions(1))[0].failure is None
        judge.close()


def test_retry_after_holds_every_call_back(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, concurrency=1)
        answer = fake._Proxy._break

        def slow_down(handler: Any, fault: str, body: bytes) -> None:
            proxy.faults.clear()
            handler.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})

        monkeypatch.setattr(fake._Proxy, "_break", slow_down)
        proxy.rate, proxy.faults[:] = 1.0, ["rate_limit"]
        began = time.monotonic()
        answers = judge.logprobs(questions(5))
        assert time.monotonic() - began >= 1.0
        assert all(a.failure is None for a in answers)
        assert judge.account.failures[Failure.RATE_LIMITED] == 1
        monkeypatch.setattr(fake._Proxy, "_break", answer)
        judge.close()


def test_a_wait_longer_than_the_budget_and_a_spent_quota_stop_the_run(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake.faulty_proxy(server.url) as proxy:
        judge = evaluator(proxy.url, outage=60)
        proxy.rate, proxy.faults[:] = 1.0, ["rate_limit"]
        reply: list[Any] = [429, {"error": {"message": "come back tomorrow"}}, {"Retry-After": "86400"}]
        monkeypatch.setattr(fake._Proxy, "_break", lambda handler, fault, body: handler.reply(*reply))
        with pytest.raises(RunStopped, match="asks to wait 86400 s"):
            judge.logprobs(questions(3))
        reply[1:] = [{"error": {"message": "no credit", "code": "insufficient_quota"}}]
        with pytest.raises(RunStopped, match="refuses to go on"):
            judge.logprobs(questions(3))
        judge.close()

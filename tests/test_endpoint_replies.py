"""What servers do besides answering well: odd replies, odd refusals, limits, and calls that are billed unseen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from rlme.errors import InputError, RunStopped
from rlme.evaluators import endpoint_client, endpoint_limits
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.evaluators.endpoint_config import EndpointConfig, Prices
from rlme.evaluators.endpoint_texts import guessed_tokens
from rlme.evaluators.endpoint_wire import read_next_tokens
from rlme.judgement import Failure, Request
from tests import fake_endpoint as fake

Route = Callable[[Any, dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(endpoint_client, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hosted chat API; `.judge(handler, request)`, where set, answers what has JUDGE in it."""
    plain = fake._Fake._complete

    def complete(handler: Any, request: dict[str, Any], chat: bool) -> None:
        judge: Route | None = getattr(handler.server, "judge", None)
        if judge is not None and "JUDGE" in json.dumps(request.get("messages") or []):
            judge(handler, request)
        else:
            plain(handler, request, chat)

    monkeypatch.setattr(fake._Fake, "_complete", complete)
    with fake.fake_endpoint("hosted") as server:
        yield server


def evaluator(server: Any, **config: Any) -> EndpointEvaluator:
    return EndpointEvaluator(EndpointConfig(base_url=server.url, **{"deadline": 5.0, "outage": 5.0} | config))


def questions(n: int = 1, text: str = "") -> list[Request]:
    return [Request(({"role": "user", "content": f"JUDGE {i} {text}"},), ("YES", "NO")) for i in range(n)]


def reply(top: dict[str, float], **usage: int) -> dict[str, Any]:
    rows = [{"token": token, "logprob": value} for token, value in top.items()]
    choice = {"message": {"content": "x"}, "logprobs": {"content": [{"token": "x", "top_logprobs": rows}]}}
    return {"choices": [choice], "usage": usage}


SURE = {"YES": -0.1, "NO": -3.0} | {f"w{i}": -9.0 for i in range(18)}


def refusing(*replies: tuple[Any, ...]) -> Route:
    """Refuses with these in turn, then answers."""
    left = list(replies)
    return lambda handler, request: handler.reply(*(left.pop(0) if left else (200, reply(SURE))))


@pytest.mark.parametrize("floor", [-9999.0, -1e30, -819.0])
@pytest.mark.parametrize("mode", ["fail", "bound"])
@pytest.mark.parametrize("there", [{"maybe": -0.01}, {"YES": -0.01}])
def test_a_floor_that_is_no_number_bounds_nothing(server: Any, floor: float, mode: str, there: Any) -> None:
    judge = evaluator(server, missing_label=mode)
    server.judge = lambda handler, _: handler.reply(200, reply(there | {f"w{i}": floor for i in range(19)}))
    (answer,) = judge.logprobs(questions())
    assert answer.failure is Failure.LABEL_MISSING and answer.logprobs is None
    judge.close()


def test_the_floor_is_the_last_of_as_many_as_were_asked_for() -> None:
    drawn_too = reply({"a": -1.0, "b": -2.0, "drawn": -30.0})
    assert read_next_tokens(drawn_too, asked=2).floor == -2.0
    assert read_next_tokens(drawn_too, asked=4).floor is None
    assert read_next_tokens(drawn_too, asked=2).count == 3


def test_a_server_that_gives_fewer_alternatives_than_asked_for(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake._Fake, "_complete", lambda handler, *_: handler.reply(200, reply(SURE)))
    judge = evaluator(server)
    assert "the 20 most likely" in judge.summary
    request = Request(questions()[0].context, ("YES", "NO", " no"))
    assert judge.logprobs([request])[0].failure is None
    judge.close()


def test_a_key_is_never_shown(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "sk-SECRET"
    monkeypatch.setenv("KEY", " sk-SECRET\n")
    evaluator(server, api_key_env="KEY").close()
    for bad in ("sk-SECRET\nmore", "sk-SECRET\u00e9", "sk-SECRET\0"):
        monkeypatch.setattr(endpoint_client.os, "environ", {"KEY": bad})
        with pytest.raises(InputError, match="'KEY', whose value has characters") as error:
            evaluator(server, api_key_env="KEY")
        assert "SECRET" not in str(error.value)


def test_rate_limits_do_not_use_up_retries(server: Any) -> None:
    judge = evaluator(server, retries=1)
    server.judge = refusing((429, {}), (429, {}), (500, {}), (429, {}))
    assert judge.logprobs(questions())[0].failure is None
    assert judge.account.failures == {Failure.RATE_LIMITED: 3, Failure.SERVER_ERROR: 1}
    judge.close()


def test_retry_after_holds_back_what_waits_for_its_place(server: Any) -> None:
    judge = evaluator(server, requests_per_minute=1200)
    server.judge = refusing((429, {}, {"Retry-After": "1"}))
    server.started.clear()
    judge.logprobs(questions(8))
    first, *later = server.started
    assert min(later) - first >= 0.9
    assert later[-1] - later[0] >= 7 * 0.05 * 0.9  # and they do not all go at once then
    judge.close()


@pytest.mark.parametrize(
    "header",
    [{"Retry-After": v} for v in ("0", "-5", "Wed, 21 Oct 2015 07:28:00 GMT")] + [{"retry-after-ms": "0"}],
)
def test_no_wait_asked_for_is_no_hot_loop(server: Any, header: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    judge = evaluator(server)
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.3)
    monkeypatch.setattr(endpoint_client, "LONGEST_PAUSE", 0.3)
    server.judge = refusing((429, {}, header), (429, {}, header))
    began = time.monotonic()
    assert judge.logprobs(questions())[0].failure is None
    assert time.monotonic() - began >= 0.3
    judge.close()


def test_a_long_wait_is_said_once(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint_limits, "LONG_WAIT", 0.2)
    judge = evaluator(server, retries=0, outage=2.4)
    slow = (429, {"error": {"message": "slow\ndown"}}, {"Retry-After": "1"})
    server.judge = refusing(slow, slow)
    judge.logprobs(questions(2))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("asks to slow down (HTTP 429: slow down); waiting for it, 1 s at most")
    monkeypatch.setattr(fake._Fake, "_complete", lambda handler, *_: handler.reply(500, {}))
    with pytest.raises(RunStopped):
        judge.logprobs(questions(2))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the server does not answer; waiting for it, 2 s at most")
    judge.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://[::1/v1", "http://host:abc/v1", "http:///v1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValidationError, match="expected http://HOST:PORT/v1"):
        EndpointConfig(base_url=url)


def test_odd_descriptions_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: dict[str, Any] = {"data": 5}
    plain = fake._Fake.do_GET

    def get(handler: Any) -> None:
        handler.reply(200, listed) if handler.path == "/v1/models" else plain(handler)

    monkeypatch.setattr(fake._Fake, "do_GET", get)
    with fake.fake_endpoint("llama") as server:
        with pytest.raises(InputError, match="serves 0 models"):
            evaluator(server)
        listed["data"] = [{"id": "tiny", "meta": "none"}]
        assert "one-token labels only" in evaluator(server).summary


def test_what_is_late_or_unreadable_is_paid_for(server: Any) -> None:
    judge = evaluator(server, prices=Prices(input=10.0), deadline=0.5, retries=0, outage=0.1, concurrency=4)
    size = judge.estimate(questions())
    before = judge.account.tokens_in
    server.judge = lambda handler, _: time.sleep(1)
    assert judge.logprobs(questions())[0].failure is Failure.TIMEOUT
    assert judge.account.tokens_in - before == size.tokens_in
    server.judge = refusing((200, b"{"), (500, {}))
    before = judge.account.tokens_in
    judge.logprobs(questions())
    assert judge.account.tokens_in - before == size.tokens_in
    before = judge.account.tokens_in
    judge.logprobs(questions())
    assert judge.account.tokens_in - before == 0  # an error is free
    judge.close()


def test_tokens_that_a_server_does_not_count_are_guessed_high(server: Any) -> None:
    judge = evaluator(server)
    server.judge = lambda handler, _: handler.reply(200, reply(SURE, prompt_tokens=50))
    (answer,) = judge.logprobs(questions())
    assert (answer.tokens_in, answer.tokens_out) == (50, 1)
    judge.close()
    assert guessed_tokens("请判断") >= 3 and guessed_tokens("😀") >= 2 and guessed_tokens("é") >= 1
    assert guessed_tokens("x" * 300) == 101


def test_an_estimate_keeps_to_the_concurrency() -> None:
    with fake.fake_endpoint("vllm_ids") as server:
        judge = evaluator(server, concurrency=2)
        server.delay, server.most_active = 0.02, 0
        judge.estimate([Request(f"{i}?", ("YES", "NO")) for i in range(20)])
        assert server.most_active <= 2
        judge.close()


@pytest.mark.parametrize(
    "body",
    [{"detail": "the maximum context length is 8"}, {"error": "prompt is too long"}, {"message": "too many tokens"}],
)
def test_too_long_in_the_servers_words(server: Any, body: dict[str, str]) -> None:
    judge = evaluator(server)
    server.judge = refusing((400, body))
    (answer,) = judge.logprobs(questions())
    assert answer.failure is Failure.CONTEXT_TOO_LONG and next(iter(body.values())) in answer.detail
    judge.close()


def test_refusals_that_pass_and_quotas_that_do_not(server: Any) -> None:
    judge = evaluator(server)
    server.judge = refusing((409, {}), (425, {}))
    assert judge.logprobs(questions())[0].failure is None
    server.judge = refusing((402, {"error": "no credit"}))
    with pytest.raises(RunStopped, match="HTTP 402: no credit"):
        judge.logprobs(questions())
    server.judge = refusing((429, {"error": {"message": "over quota", "type": "insufficient_quota"}}))
    with pytest.raises(RunStopped, match="over quota"):
        judge.logprobs(questions())
    judge.close()


def test_half_a_character_fails_at_once(server: Any) -> None:
    judge = evaluator(server)
    judge.account.failures.clear()
    (answer,) = judge.logprobs(questions(1, "\ud83d"))
    assert answer.failure is Failure.REFUSED and "lone surrogate" in answer.detail
    assert judge.account.failures == {Failure.REFUSED: 1}
    judge.close()

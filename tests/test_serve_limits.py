"""The reward server's limits: token, sizes, queue, stops, clients that hang up, and the count of all this."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from rlme.serve.app import create_app
from rlme.serve.batcher import scorer
from tests.test_serve import Judge, Server, item, reward_of, serving


def test_large_bodies_are_refused_with_and_without_a_length() -> None:
    with serving(Judge(), max_body=10_000) as server:
        big = json.dumps({"items": [item("x" * 20_000)]}).encode()
        assert server.call("POST", "/score", big)[0] == 413
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        pieces = iter([big[i : i + 1000] for i in range(0, len(big), 1000)])
        connection.request("POST", "/score", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert server.call("POST", "/score", {"items": [item("small")]})[0] == 200


def test_a_token_is_required_everywhere_but_for_health() -> None:
    with serving(Judge(), token="s3cret") as server:
        body = {"items": [item("a")]}
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            status, reply, _ = server.call("POST", "/score", body, **given)
            assert status == 401 and "results" not in reply
            assert server.call("GET", "/metrics", **given)[0] == 401
        assert server.call("GET", "/health")[0] == 200
        assert server.call("POST", "/score", body, Authorization="Bearer s3cret")[0] == 200
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as early:  # before there is a body
            early.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n")
            assert early.recv(100).startswith(b"HTTP/1.1 401")


def test_a_full_queue_refuses_and_recovers() -> None:
    with serving(Judge(delay=0.3), max_waiting=8) as server, ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(lambda i: server.call("POST", "/score", {"items": [item(str(i))] * 2}), range(30)))
        statuses = {status for status, _, _ in replies}
        assert statuses == {200, 503}
        refused = next(r for r in replies if r[0] == 503)
        assert refused[2]["retry-after"] == "1" and "limit" in refused[1]["detail"]
        assert server.call("POST", "/score", {"items": [item("later")]})[0] == 200
        assert server.app.state.batcher.waiting == 0


def test_a_stop_finishes_what_is_running() -> None:
    with serving(Judge(delay=0.5)) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.call, "POST", "/score", {"items": [item("a")]})
        time.sleep(0.2)
        server.stop()
        assert running.result()[0] == 200
        with pytest.raises(OSError):
            server.call("GET", "/health")


def test_a_stop_does_not_wait_longer_than_its_grace(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(create_app([scorer(reward_of(Judge(delay=8)))]), grace=1)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(server.call, "POST", "/score", {"items": [item("a")]})
        time.sleep(0.3)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 4
        assert hanging.result()[:2] == (503, {"detail": "the server is stopping"})
    assert "Traceback" not in caplog.text


def test_a_request_larger_than_a_batch_is_judged_in_parts() -> None:
    judge = Judge()
    with serving(judge, max_batch=4) as server:
        texts = [str(i) for i in range(10)]
        _, reply, _ = server.call("POST", "/score", {"items": [item(t) for t in texts]})
        assert judge.batches == [8, 8, 4]  # two questions each
        assert [r["reward"] for r in reply["results"]] == reward_of(Judge()).score(["Why?"] * 10, texts)


def test_who_hangs_up_is_not_judged() -> None:
    judge = Judge(delay=0.5)
    with serving(judge) as server:
        connections = []
        for i in range(5):
            connections.append(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20))
            body = json.dumps({"items": [item(str(i))]})
            connections[-1].request("POST", "/score", body, {"Content-Type": "application/json"})
            time.sleep(0.05)
        for connection in connections:
            connection.close()
        assert server.call("POST", "/score", {"items": [item("who waits")]})[0] == 200
        assert judge.batches == [2, 2] and server.app.state.batcher.waiting == 0
        assert 'rlme_requests_total{status="499"} 5.0' in server.call("GET", "/metrics")[1]


def test_refusals_and_errors_are_counted() -> None:
    with serving(Judge(), max_body=1000) as server:
        assert server.call("POST", "/score", b"x" * 2000)[0] == 413
        assert server.call("POST", "/score", {"items": [item("crash")]})[0] == 500
        text = server.call("GET", "/metrics")[1]
        assert all(f'rlme_requests_total{{status="{status}"}} 1.0' in text for status in (413, 500))


def test_spending_is_what_the_evaluators_account_for() -> None:
    judge = Judge()
    totals = {"tokens_in": 50.0, "tokens_cached": 0.0, "tokens_out": 2.0, "cost": 3.0}
    judge.account = SimpleNamespace(metrics=lambda: dict(totals))  # type: ignore[attr-defined]
    with serving(judge, evaluators=[judge]) as server:
        server.call("POST", "/score", {"items": [item("fail")]})
        for cost in (3.0, 5.0, 5.0):
            totals["cost"] = cost
            text = server.call("GET", "/metrics")[1]
            assert f'rlme_evaluator_cost_total{{evaluator="hash"}} {cost}' in text
            assert 'rlme_evaluator_tokens_total{evaluator="hash",way="in"} 50.0' in text

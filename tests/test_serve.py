"""The reward server, over real sockets: rewards, failures, batching, the command. Limits: test_serve_limits.py."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import uvicorn

from rlme.config_file import validate
from rlme.errors import InputError, RunStopped
from rlme.judgement import Answer, Failure, Message, Request
from rlme.judging import Judging
from rlme.reward import MetaReward
from rlme.serve.app import create_app
from rlme.serve.batcher import scorer
from rlme.serve.config import ServeConfig


class Judge:
    """Log-probabilities from a hash of the context; "fail" in it fails, "stop" stops, "crash" raises."""

    name, chat = "hash", True

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.batches: list[int] = []

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        time.sleep(self.delay)
        self.batches.append(len(requests))
        return [self.answer(r) for r in requests]

    def answer(self, request: Request) -> Answer:
        text = str(request.context)
        if "stop" in text:
            raise RunStopped("the endpoint is gone")
        if "crash" in text:
            raise ZeroDivisionError
        if "fail" in text:
            return Answer.failed(Failure.TIMEOUT, "too late")
        draw = random.Random(text)
        return Answer(
            tuple(-1 - 5 * draw.random() for _ in request.continuations), tokens_in=7, tokens_out=1, cost=0.25
        )

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        return ["" for _ in requests]

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for c in candidates if not c.startswith(" "))

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        return None


def reward_of(judge: Judge, **options: Any) -> MetaReward:
    questions = (
        {"right": "Is it right?", "kind": "Is it kind to {{ name or 'all' }}?"}
        if options.pop("named", 0)
        else {
            "right": "Is it right?",
            "short": "Is it short?",
        }
    )
    return MetaReward(questions, [judge], judging=Judging(template="judge"), **options)


class Server:
    def __init__(self, app: Any, grace: int = 10) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.app = app
        config = uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=grace)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = (response.headers.get("content-type") or "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text.decode(), dict(response.headers)

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)


@contextmanager
def serving(
    judge: Judge, *, workers: int = 1, reward: dict[str, Any] | None = None, **options: Any
) -> Iterator[Server]:
    scorers = [scorer(reward_of(judge, **(reward or {}))) for _ in range(workers)]
    server = Server(create_app(scorers, **options))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Judge()) as running:
        yield running


def item(completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "completion": completion, **more}


def test_rewards_are_those_of_the_reward_function(server: Server) -> None:
    texts = [f"answer {i}" for i in range(20)]
    status, reply, _ = server.call("POST", "/score", {"items": [item(t) for t in texts]})
    here = reward_of(Judge())
    assert status == 200 and reply["missing"] == 0
    assert [r["reward"] for r in reply["results"]] == here.score(["Why?"] * 20, texts)
    first = reply["results"][0]["judgements"]
    assert [(j["evaluator"], j["question"], j["weight"]) for j in first] == [("hash", "right", 1), ("hash", "short", 1)]
    assert first[0]["score"] < 0 and 0 < first[0]["probability"] < 1 and first[0]["tokens_in"] == 7


def test_a_failed_judgement_is_null_with_its_reason(server: Server) -> None:
    status, reply, _ = server.call("POST", "/score", {"items": [item("fail"), item("fine")]})
    bad, good = reply["results"]
    assert status == 200 and reply["missing"] == 1
    assert bad["reward"] is None and good["reward"] < 0
    assert bad["judgements"][0] | {"weight": 1} == {
        "evaluator": "hash", "question": "right", "weight": 1, "score": None, "probability": None, "mass": None,
        "bounded": False, "failure": "timeout", "detail": "too late", "critique": None,
        "tokens_in": 0, "tokens_cached": 0, "tokens_out": 0, "cost": 0.0,
    }  # fmt: skip


def test_chat_prompts_and_columns() -> None:
    with serving(Judge(), reward={"named": True}) as server:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        items = [item("a", columns={"name": "Ada"}), item("a"), {"prompt": chat, "completion": "b"}]
        status, reply, _ = server.call("POST", "/score", {"items": items})
        assert status == 200
        kinds = [[j["failure"] for j in r["judgements"]] for r in reply["results"]]
        assert kinds == [[None, None], [None, "template"], [None, "template"]]  # a lacking column is no empty one


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"items": []}, "items"),
        ({"items": [{"prompt": "Why?"}]}, "completion"),
        ({"items": [item("a", reward=1)]}, "reward"),
        ({"items": [item("a", columns={"gold": 1})]}, "columns"),
        ({"items": [item("a")] * 1025}, "items"),
        (b"{not json", "JSON"),
    ],
)
def test_bad_requests_are_named(server: Server, body: Any, where: str) -> None:
    status, reply, _ = server.call("POST", "/score", body)
    assert status == 422 and where in json.dumps(reply)


def test_answers_and_anchors() -> None:
    anchored = item("The answer is 4", answer="4", anchored=True)
    with serving(Judge(), reward={"answer": "gold"}) as server:
        _, reply, _ = server.call("POST", "/score", {"items": [anchored, item("It is 5", answer="4"), item("5")]})
        assert [r["correct"] for r in reply["results"]] == [True, False, None]
    with serving(Judge()) as server:
        status, reply, _ = server.call("POST", "/score", {"items": [anchored]})
        assert status == 422 and "data.answer" in reply["detail"]


def test_openapi_health_and_metrics(server: Server) -> None:
    schema = server.call("GET", "/openapi.json")[1]
    assert {"/score", "/openrlhf", "/health", "/metrics"} <= set(schema["paths"])
    assert server.call("GET", "/health")[1] == {"status": "ok", "waiting": 0}
    server.call("POST", "/score", {"items": [item("fail")]})
    text = server.call("GET", "/metrics")[1]
    assert 'rlme_judgement_failures_total{evaluator="hash",kind="timeout",question="right"}' in text
    for name in (
        "rlme_requests_total",
        "rlme_rewards_missing_total",
        "rlme_request_seconds_bucket",
        "rlme_evaluator_cost",
    ):
        assert name in text


def test_requests_that_arrive_together_are_judged_together() -> None:
    judge = Judge(delay=0.1)
    with serving(judge) as server, ThreadPoolExecutor(40) as pool:
        bodies = [{"items": [item(f"{i}"), item(f"{i}b")]} for i in range(40)]
        replies = list(pool.map(lambda body: server.call("POST", "/score", body), bodies))
        assert all(status == 200 for status, _, _ in replies)
        assert len(judge.batches) < 15
        here = reward_of(Judge())
        for body, (_, reply, _) in zip(bodies, replies, strict=True):
            texts = [i["completion"] for i in body["items"]]
            assert [r["reward"] for r in reply["results"]] == here.score(["Why?"] * 2, texts)


def test_one_bad_request_in_a_batch_does_not_hurt_the_others() -> None:
    with serving(Judge(delay=0.05)) as server, ThreadPoolExecutor(9) as pool:
        texts = ["fine 1", "crash", "fine 2", "stop", "fine 3", "fail", "fine 4"]
        replies = list(pool.map(lambda t: server.call("POST", "/score", {"items": [item(t)]}), texts))
        assert [status for status, _, _ in replies] == [200, 500, 200, 503, 200, 200, 200]
        assert "endpoint is gone" in replies[3][1]["detail"]
        assert replies[5][1]["results"][0]["reward"] is None


def test_content_parts_and_an_empty_answer() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    chats = [
        [{"role": "user", "content": content}, {"role": "assistant", "content": None}] for content in (parts, "Hi you")
    ]
    with serving(Judge(), reward={"answer": "gold", "mode": "rlvr+rlme"}) as server:
        items = [{"prompt": chat, "completion": "b", "answer": "b"} for chat in chats]
        _, reply, _ = server.call("POST", "/score", {"items": [*items, item("b", answer=" ")]})
        first, second, third = reply["results"]
        assert first == second and first["reward"] is not None
        assert third["reward"] is None and third["correct"] is None
        image = [{"role": "user", "content": [{"type": "image"}]}]
        assert server.call("POST", "/score", {"items": [{"prompt": image, "completion": "b"}]})[0] == 422


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"questions": {"q": "Right?"}, "evaluators": ["live"]}, "'live' is the policy"),
        ({"questions": {}, "evaluators": ["m"]}, "needs `questions`"),
        ({"questions": {"q": "Right?"}, "evaluators": ["m"], "reward": "rlvr"}, "set data.answer"),
        ({"questions": {"q": "Right?"}, "evaluators": ["m"], "tempo": 1}, "tempo"),
        ({"questions": {"q": "{{ n_tokens }} tokens: short?"}, "evaluators": ["m"]}, "n_tokens"),
        ({"questions": {"q": "Right?"}, "evaluators": ["m"], "data": {"compare": "maths"}}, "'maths', expected math"),
        ({"questions": {"q": "Right?"}, "evaluators": ["m"], "data": {"completion_format": "regex:("}}, "regex:"),
    ],
)
def test_what_cannot_be_served_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(ServeConfig, content, "serve.yaml")


@pytest.mark.parametrize("cached", [False, True])
def test_what_an_endpoint_cannot_answer_is_refused_at_the_start(cached: bool, tmp_path: Path) -> None:
    from rlme.serve.config import check_labels, make_evaluators, make_reward
    from tests.fake_endpoint import fake_endpoint

    with fake_endpoint("hosted") as endpoint:
        content = {"questions": {"q": "Right?"}, "evaluators": {"name": "j", "endpoint": {"base_url": endpoint.url}}}
        for judging, message in (
            ({"template": "reply", "readout": "yes_no"}, "use a chat template"),
            ({"template": "judge", "readout": "marker"}, "cannot spell the label"),
            ({"template": "judge", "readout": "yes_no"}, None),
        ):
            cache = {"cache": str(tmp_path / "judge.sqlite")} if cached else {}
            config = validate(ServeConfig, {**content, "judging": judging | cache}, "serve.yaml")
            evaluators = make_evaluators(config)
            assert "one-token labels" in evaluators[0].summary  # type: ignore[attr-defined]
            if message is None:
                check_labels(config, evaluators)
                calls = []
                for _ in range(2):
                    rewards = make_reward(config, evaluators).score(["Why?"], ["Because."])
                    calls.append(endpoint.calls.total())
                    assert rewards[0] is not None and rewards[0] < 0
                assert (calls[0] == calls[1]) is cached
            else:
                with pytest.raises(InputError, match=message):
                    check_labels(config, evaluators)
            evaluators[0].close()  # type: ignore[attr-defined]


def test_beyond_loopback_only_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlme.serve.cli import serve

    monkeypatch.delenv("RLME_SERVE_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"0\.0\.0\.0 .*bearer token"):
        serve(tmp_path / "c.yaml", host="0.0.0.0", token_env="RLME_SERVE_TOKEN")


def test_the_port_is_taken_before_anything_is_loaded(tmp_path: Path) -> None:
    from rlme.serve.cli import serve

    path = tmp_path / "c.yaml"
    path.write_text("questions: {q: 'Right?'}\nevaluators: [nothing-here]\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"--port {port}: Address already in use.*expected .* a free port"):
            serve(path, port=port, token_env="RLME_SERVE_TOKEN")
    with pytest.raises(InputError, match="model 'nothing-here'"):
        serve(path, port=port, token_env="RLME_SERVE_TOKEN")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_the_printed_address_is_the_one_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlme.serve.cli import serve
    from tests.fake_endpoint import fake_endpoint

    def run(server: Any, sockets: list[socket.socket]) -> None:
        host, port = re.findall(r"http://(127\.0\.0\.[12]|\[::1\]):(\d+) ", capsys.readouterr().out)[0]
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    with fake_endpoint("hosted") as endpoint:
        path = tmp_path / "c.yaml"
        path.write_text(
            f"questions: {{q: 'Right?'}}\nevaluators: {{endpoint: {{base_url: '{endpoint.url}'}}}}\n"
            "judging: {template: judge, readout: yes_no}\n"
        )
        for host in ("127.0.0.1", "127.0.0.2", *(["::1"] if has_ipv6() else [])):
            serve(
                path,
                host=host,
                port=0,
                token_env="RLME_SERVE_TOKEN",
                max_body_mb=1,
                max_batch=8,
                max_waiting=8,
                grace=1,
            )


def test_cache_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlme.evaluators.cache import CachedEvaluator, JudgeCache
    from rlme.serve.cli import cache_clear, cache_stats

    path, table = tmp_path / "c.sqlite", tmp_path / "t.json"
    with pytest.raises(InputError, match="no such file"):
        cache_stats(path, None)
    CachedEvaluator(Judge(), JudgeCache(path), identity="m@1").logprobs(
        [Request("a", ("YES",)), Request("b", ("YES",))]
    )
    cache_stats(path, table)
    assert "2 answers" in capsys.readouterr().out
    assert json.loads(table.read_text())["by_evaluator"] == {"m@1": 2}
    cache_clear(path)
    assert "2 answers forgotten" in capsys.readouterr().out


def test_an_outage_is_everybodys() -> None:
    judge = Judge(delay=0.05)
    with serving(judge) as server, ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda i: server.call("POST", "/score", {"items": [item(f"stop {i}")]}), range(20)))
        assert {status for status, _, _ in replies} == {503}
    assert len(judge.batches) < 12  # each batch is tried once whole and twice in part

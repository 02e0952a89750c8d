"""The judge cache: exact, shared by processes, bounded, and never a home for failures."""

from __future__ import annotations

import math
import multiprocessing
import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.evaluators.cache import CachedEvaluator, JudgeCache, model_identity, read_stats
from rlme.judgement import Answer, Failure, Message, Request


class Counting:
    """An evaluator that counts what it is asked; contexts with "fail" in them fail."""

    name, chat = "counting", True

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [
            Answer.failed(Failure.TIMEOUT, "late")
            if "fail" in str(r.context)
            else Answer(tuple(-random.Random(f"{r}{c}").random() for c in r.continuations), tokens_in=9, cost=0.5)
            for r in requests
        ]

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        self.asked += requests
        return [Failure.TIMEOUT if "fail" in str(r.context) else f"{r.context} {max_tokens}" for r in requests]

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        return tuple(candidates)

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        return 3


def cached(path: Path, identity: str = "m@1") -> tuple[CachedEvaluator, Counting]:
    inner = Counting()
    return CachedEvaluator(inner, JudgeCache(path), identity=identity), inner


REQUESTS = [Request(f"context {i}", ("YES", "NO")) for i in range(20)]


def test_second_time_is_free_and_bit_for_bit_equal(tmp_path: Path) -> None:
    first, _ = cached(tmp_path / "c.sqlite")
    assert isinstance(first, Evaluator) and (first.name, first.chat) == ("counting", True)
    answers = first.logprobs(REQUESTS)
    second, inner = cached(tmp_path / "c.sqlite")
    again = second.logprobs(REQUESTS[::-1])[::-1]
    assert not inner.asked and second.hits == 20
    assert [a.logprobs for a in again] == [a.logprobs for a in answers]
    assert all((a.tokens_in, a.cost) == (0, 0.0) for a in again)


def test_equal_requests_in_a_batch_are_asked_and_paid_once(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "c.sqlite")
    answers = judge.logprobs([REQUESTS[0], REQUESTS[1], REQUESTS[0], REQUESTS[0]])
    assert len(inner.asked) == 2
    assert answers[0].logprobs == answers[2].logprobs == answers[3].logprobs
    assert sum(a.cost for a in answers) == 1.0


class Beginning(Counting):
    """One that can be asked ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[Request, int | None]] = []

    def begin(self, requests: Sequence[Request], *, max_tokens: int | None = None) -> None:
        self.begun += [(r, max_tokens) for r in requests]


def test_only_what_is_not_known_is_begun_and_only_once(tmp_path: Path) -> None:
    inner = Beginning()
    judge = CachedEvaluator(inner, JudgeCache(tmp_path / "c.sqlite"), identity="m")
    one, two = Request("one", ("a",)), Request("two", ("a",))
    judge.logprobs([one])
    judge.begin([one, two])
    judge.begin([two])
    judge.begin([two], max_tokens=3)
    assert inner.begun == [(two, None), (two, 3)]
    judge.logprobs([one, two])
    judge.begin([two])
    assert len(inner.begun) == 2
    CachedEvaluator(Counting(), judge.cache, identity="n").begin([one])


@pytest.mark.parametrize(
    "other",
    [
        Request("context 0", ("YES", "No")),
        Request("context 0", ("NO", "YES")),
        Request("context 0 ", ("YES", "NO")),
        Request("context 0", ("YES", "NO"), "ø"),
        Request(({"role": "user", "content": "context 0"},), ("YES", "NO")),
    ],
)
def test_anything_else_is_another_key(tmp_path: Path, other: Request) -> None:
    judge, inner = cached(tmp_path / "c.sqlite")
    judge.logprobs([REQUESTS[0], other])
    assert len(inner.asked) == 2


def test_another_model_or_revision_is_another_key(tmp_path: Path) -> None:
    cached(tmp_path / "c.sqlite", "m@1")[0].logprobs(REQUESTS)
    judge, inner = cached(tmp_path / "c.sqlite", "m@2")
    judge.logprobs(REQUESTS)
    assert len(inner.asked) == 20


def test_failures_and_infinities_are_not_kept(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "c.sqlite")
    bad = Request("fail", ("YES",))
    for _ in range(2):
        assert judge.logprobs([bad])[0].failure is Failure.TIMEOUT
        assert judge.write([bad], max_tokens=5) == [Failure.TIMEOUT]
    assert len(inner.asked) == 4 and judge.cache.stats().answers == 0
    inner.logprobs = lambda requests: [Answer((-math.inf,)) for _ in requests]  # type: ignore[method-assign]
    judge.logprobs([REQUESTS[0]])
    assert judge.cache.stats().answers == 0


def test_written_text_is_kept_apart_by_length(tmp_path: Path) -> None:
    judge, inner = cached(tmp_path / "c.sqlite")
    assert judge.write(REQUESTS[:1], max_tokens=5) == judge.write(REQUESTS[:1], max_tokens=5) == ["context 0 5"]
    assert judge.write(REQUESTS[:1], max_tokens=6) == ["context 0 6"]
    assert len(inner.asked) == 2


def test_size_is_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "c.sqlite", max_bytes=300_000)
    judge = CachedEvaluator(Counting(), cache, identity="m")
    keep = Request("keep me", ("YES", "NO"))
    judge.logprobs([keep])
    for batch in range(40):
        judge.logprobs([Request(f"{batch} {i}", ("YES", "NO")) for i in range(100)])
        judge.logprobs([keep])  # used often: stays
    assert cache.stats().bytes < 400_000 and 500 < cache.stats().answers < 4000
    assert judge.misses == 4001


def _work(path: str, seed: int) -> None:
    judge = CachedEvaluator(Counting(), JudgeCache(path), identity="m")
    for i in range(30):
        judge.logprobs([Request(f"{(seed * 7 + i) % 50} {j}", ("YES", "NO")) for j in range(10)])


def test_several_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(str(path), seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    stats = JudgeCache(path).stats()
    assert stats.answers == len({(s * 7 + i) % 50 for s in range(3) for i in range(30)}) * 10
    assert stats.by_evaluator == {"m": stats.answers}


def test_clear_and_a_file_that_is_no_cache(tmp_path: Path) -> None:
    judge, _ = cached(tmp_path / "sub" / "c.sqlite")
    judge.logprobs(REQUESTS)
    assert judge.cache.clear() == 20 and judge.cache.stats().answers == 0
    judge.cache.close()
    other = tmp_path / "notes.txt"
    other.write_text("no database " * 1000)
    with pytest.raises(InputError, match=r"notes\.txt: cannot be used"):
        JudgeCache(other)
    assert other.read_text().startswith("no database")


@pytest.mark.parametrize(
    ("table", "version"),
    [("answers(id, survey)", 7), ("answers(id, survey)", 0), ("users(id)", 0), ("answers(key, evaluator, value)", 1)],
)
def test_a_foreign_database_is_refused_and_left_alone(tmp_path: Path, table: str, version: int) -> None:
    path = tmp_path / "f.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table}")
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = path.read_bytes()
    for opened in (JudgeCache, read_stats):
        with pytest.raises(InputError, match="holds something else; expected a judge cache"):
            opened(path)
    assert path.read_bytes() == before


def test_statistics_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c?#.sqlite"
    path.touch()
    assert read_stats(path).answers == 0 and path.stat().st_size == 0
    judge, _ = cached(path)  # an empty file may become a cache
    judge.logprobs(REQUESTS)
    assert read_stats(path) == judge.cache.stats()  # also while it is in use
    judge.cache.close()
    before = path.read_bytes()
    assert read_stats(path).by_evaluator == {"m@1": 20}
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_corrupt_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    judge, _ = cached(path)
    requests = [Request(f"context {i}", ("YES", "NO")) for i in range(2000)]
    judge.logprobs(requests)
    judge.cache.close()
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = random.Random(0).randbytes(len(content) - 4096 * 2)
    path.write_bytes(content)
    for use in (lambda: cached(path)[0].logprobs(requests), lambda: read_stats(path)):
        with pytest.raises(InputError, match=r"c\.sqlite: cannot be used \(.*malformed.*\); expected an intact"):
            use()


@pytest.mark.parametrize("value", ["{oops", "7", "[[-1.0], []]", "[[-1.0, NaN], []]", '[["a", "b"], []]'])
def test_a_bad_value_is_asked_again(tmp_path: Path, value: str) -> None:
    judge, inner = cached(tmp_path / "c.sqlite")
    answers = judge.logprobs(REQUESTS[:2])
    judge.write(REQUESTS[:1], max_tokens=5)
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute("UPDATE answers SET value = ?", (value,))
    connection.close()
    assert judge.logprobs(REQUESTS[:2]) == answers
    assert judge.write(REQUESTS[:1], max_tokens=5) == ["context 0 5"]
    assert len(inner.asked) == 6


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    assert model_identity("org/model") == "org/model@main" != model_identity("org/model", "v2")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = model_identity(str(tmp_path))
    weights.write_bytes(b"2")
    assert model_identity(str(tmp_path)) != before


def test_what_was_answered_before_a_stop_is_kept(tmp_path: Path) -> None:
    evaluator, inner = cached(tmp_path / "c.sqlite")
    plain = inner.logprobs

    def stops(requests: Sequence[Request]) -> list[Answer]:
        found = plain(requests)
        raise RunStopped("max_cost", answered={i: found[i] for i in (0, 3, 4)})

    inner.logprobs = stops  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match="max_cost"):
        evaluator.logprobs(REQUESTS)
    evaluator, inner = cached(tmp_path / "c.sqlite")
    evaluator.logprobs(REQUESTS)
    assert inner.asked == [r for i, r in enumerate(REQUESTS) if i not in (0, 3, 4)]

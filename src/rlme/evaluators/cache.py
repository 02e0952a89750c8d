"""A judge cache: answers on disk, so that no question is paid for twice. A wrapper around any evaluator but a live one.

One SQLite file, safe with several processes. A key is a digest of everything the answer depends on: the evaluator
(model and revision, or a digest of its weights), the exact text of the request, and the labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlme.errors import InputError, RunStopped
from rlme.evaluators.base import Evaluator
from rlme.judgement import Answer, Failure, Message, Request

T = TypeVar("T")

DEFAULT_BYTES = 1 << 30
_VERSION = 1  # of the format below
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, evaluator TEXT NOT NULL, value TEXT NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_used ON answers (used);
"""


_PATIENCE = 60.0  # seconds to wait for other processes


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache file holds."""

    answers: int
    bytes: int
    """Size of the file."""
    by_evaluator: dict[str, int]


class JudgeCache:
    """The file. Reads and writes whole batches; the least recently used answers go when it outgrows `max_bytes`."""

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_BYTES) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._connections: dict[tuple[int, int], sqlite3.Connection] = {}
        with _named_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._create)
            _to_wal(self._connection())  # kept in the file; not before it is known to be ours

    def get(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The stored values among `keys`."""
        found: dict[bytes, str] = {}
        with _named_errors(self.path):
            connection = self._connection()
            for some in _chunks(keys, 500):
                marks = ",".join("?" * len(some))
                found |= dict(connection.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", some))
            if found:
                used = [(time.time(), key) for key in found]
                self._write(lambda c: c.executemany("UPDATE answers SET used = ? WHERE key = ?", used))
        return found

    def put(self, evaluator: str, values: dict[bytes, str]) -> None:
        """Store values; then, if the file is over its size, drop the least recently used tenth."""
        now = time.time()
        rows = [(key, evaluator, value, now) for key, value in values.items()]
        if not rows:
            return

        def insert(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)
            if self._used(connection) > self.max_bytes:
                self._shrink(connection)

        with _named_errors(self.path):
            self._write(insert)

    def stats(self) -> CacheStats:
        """Counts and size."""
        with _named_errors(self.path):
            return _stats(self._connection(), self.path)

    def clear(self) -> int:
        """Forget everything; returns how many answers there were."""
        with _named_errors(self.path):
            connection = self._connection()
            n = int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
            self._write(lambda c: c.execute("DELETE FROM answers"))
            connection.execute("VACUUM")
        return n

    def close(self) -> None:
        """Close this process's connections."""
        for (pid, _), connection in self._connections.items():
            if pid == os.getpid():
                connection.close()
        self._connections.clear()

    def _create(self, connection: sqlite3.Connection) -> None:
        _check_ours(connection, self.path)
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _connection(self) -> sqlite3.Connection:
        # SQLite connections must not cross a fork and are used by one thread at a time.
        owner = (os.getpid(), threading.get_ident())
        if owner not in self._connections:
            connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose answers, never corrupt the file
            self._connections[owner] = connection
        return self._connections[owner]

    def _write(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")  # take the write lock at once: upgrading a read lock can fail
        try:
            work(connection)
        except BaseException:
            if connection.in_transaction:  # some errors of the file have ended it
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @staticmethod
    def _used(connection: sqlite3.Connection) -> int:
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def _shrink(self, connection: sqlite3.Connection) -> None:
        count = int(connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
        while count and self._used(connection) > 0.9 * self.max_bytes:
            drop = max(1, count // 10)
            connection.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT ?)", (drop,)
            )
            count -= drop


def read_stats(path: Path) -> CacheStats:
    """Counts and size of a cache file, which is left as it is. `InputError` for a file that is no judge cache."""
    # A file that no process has open is read without the lock files that SQLite would leave beside it.
    alone = not path.with_name(f"{path.name}-wal").exists()
    where = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
    with _named_errors(path), closing(sqlite3.connect(where, uri=True, timeout=_PATIENCE)) as connection:
        return _stats(connection, path) if _check_ours(connection, path) else CacheStats(0, path.stat().st_size, {})


def _stats(connection: sqlite3.Connection, path: Path) -> CacheStats:
    rows = connection.execute("SELECT evaluator, COUNT(*) FROM answers GROUP BY evaluator").fetchall()
    counts = {str(name): int(n) for name, n in rows}
    return CacheStats(sum(counts.values()), path.stat().st_size, counts)


def _check_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is a judge cache; False for an empty one. `InputError` for anything else: it is not ours to
    change."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    columns = [row[1] for row in connection.execute("PRAGMA table_info(answers)")]
    if not tables and version == 0:
        return False
    if (version, tables, columns) != (_VERSION, {"answers"}, ["key", "evaluator", "value", "used"]):
        raise InputError(
            f"judge cache {path}: this SQLite file holds something else; expected a judge cache of this version of "
            "rlme, or a path where there is no file yet"
        )
    return True


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.DatabaseError) as error:
        raise InputError(
            f"judge cache {path}: cannot be used ({error}); expected an intact cache, or no file"
        ) from None


def _to_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite does not wait here when another process does the same: it says "locked"."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)


class CachedEvaluator:
    """An evaluator that looks into the cache first. Failures are never stored; cached answers cost nothing.

    `identity` is what the answers depend on besides the request, e.g. "hub-id@revision": see `model_identity`.
    """

    def __init__(self, inner: Evaluator, cache: JudgeCache, *, identity: str) -> None:
        self.inner = inner
        self.cache = cache
        self.identity = identity
        self.name = inner.name
        self.chat = inner.chat
        self.hits = 0
        self.misses = 0
        self._begun: set[bytes] = set()

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers from the cache where they are there, from the evaluator otherwise; equal requests are asked once."""
        return self._through(requests, _kind(None), self.inner.logprobs, _dump_answer, _load_answer)

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        """Greedy text, from the cache where it is there."""

        def written(some: Sequence[Request]) -> list[str | Failure]:
            return self.inner.write(some, max_tokens=max_tokens)

        return self._through(requests, _kind(max_tokens), written, _dump_text, _load_text)

    def __getattr__(self, name: str) -> Any:
        """What else the evaluator has: its account, its summary, its check at the start."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def begin(self, requests: Sequence[Request], *, max_tokens: int | None = None) -> None:
        """Have the evaluator start on what is not in the cache, if it can (see `Evaluator`)."""
        begin = getattr(self.inner, "begin", None)
        if begin is None:
            return
        keys = [_key(self.identity, _kind(max_tokens), request) for request in requests]
        known = self._begun | self.cache.get(keys).keys()
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        self._begun |= missing.keys()
        begin(list(missing.values()), max_tokens=max_tokens)

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """As the evaluator says."""
        return self.inner.spellings(candidates)

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        """As the evaluator says."""
        return self.inner.count_tokens(context)

    def _through(
        self,
        requests: Sequence[Request],
        kind: str,
        ask: Callable[[Sequence[Request]], list[T]],
        dump: Callable[[T], str | None],
        load: Callable[[str, Request], T | None],
    ) -> list[T]:
        keys = [_key(self.identity, kind, request) for request in requests]
        self._begun.difference_update(keys)
        wanted = dict(zip(keys, requests, strict=True))
        stored = self.cache.get(list(wanted))
        loaded = {key: load(value, wanted[key]) for key, value in stored.items()}
        answers = {key: answer for key, answer in loaded.items() if answer is not None}
        missing = {key: request for key, request in wanted.items() if key not in answers}
        try:
            fresh = dict(zip(missing, ask(list(missing.values())), strict=True)) if missing else {}
        except RunStopped as stop:
            names = list(missing)
            paid_for = {names[i]: dump(answer) for i, answer in stop.answered.items()}
            self.cache.put(self.identity, {key: value for key, value in paid_for.items() if value is not None})
            raise
        values = {key: dump(answer) for key, answer in fresh.items()}
        self.cache.put(self.identity, {key: value for key, value in values.items() if value is not None})
        self.hits += len(requests) - len(missing)
        self.misses += len(missing)
        # The first of several equal requests carries the cost, the others were free.
        result: list[T] = []
        for key in keys:
            result.append(answers[key] if key in answers else fresh[key])
            value = values.get(key)
            if value is not None and (free := load(value, wanted[key])) is not None:
                answers[key] = free
        return result


def model_identity(path: str, revision: str | None = None) -> str:
    """What names a model's weights: hub id and revision, or for a local folder or file a digest of the weights."""
    local = Path(path)
    if not local.exists():
        return f"{path}@{revision or 'main'}"
    files = [local] if local.is_file() else sorted(p for p in local.iterdir() if p.suffix in _WEIGHTS)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return f"{local.name}#{digest.hexdigest()}"


_WEIGHTS = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model"}
"""Weights, and what else changes an answer: configuration, tokenizer, chat template."""


def _kind(max_tokens: int | None) -> str:
    return "logprobs" if max_tokens is None else f"write:{max_tokens}"


def _key(identity: str, kind: str, request: Request) -> bytes:
    continuations = list(request.continuations) if kind == "logprobs" else []
    parts = [identity, kind, request.context, request.prefill, continuations]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=20).digest()


def _dump_answer(answer: Answer) -> str | None:
    if answer.logprobs is None or answer.failure is not None or not all(map(math.isfinite, answer.logprobs)):
        return None
    return json.dumps([answer.logprobs, answer.bounded])  # repr of a double: read back bit for bit


def _load_answer(value: str, request: Request) -> Answer | None:
    """None for a value that no evaluator gave: the question is asked anew."""
    try:
        logprobs, bounded = json.loads(value)
        answer = Answer(tuple(float(x) for x in logprobs), bounded=tuple(bool(x) for x in bounded))
    except (ValueError, TypeError):
        return None
    given, expected = answer.logprobs or (), len(request.continuations)
    whole = len(given) == expected and len(answer.bounded) in (0, expected)
    return answer if whole and all(map(math.isfinite, given)) else None


def _dump_text(text: str | Failure) -> str | None:
    return None if isinstance(text, Failure) else json.dumps(text)


def _load_text(value: str, _: Request) -> str | Failure | None:
    try:
        text = json.loads(value)
    except (ValueError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _chunks(items: Sequence[bytes], size: int) -> Iterable[Sequence[bytes]]:
    return (items[i : i + size] for i in range(0, len(items), size))

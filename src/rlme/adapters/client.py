"""A client of the reward server, in the standard library alone."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

URL_ENV = "RLME_SERVE_URL"
TOKEN_ENV = "RLME_SERVE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8765"
MAX_ITEMS = 1024
"""Completions in one request; more are sent in several."""
MAX_BYTES = 8 << 20
"""Bytes in one request, unless a single completion has more: half of what a server takes by default."""


class RewardServerError(RuntimeError):
    """The server could not be reached, or refused the request."""


class MissingReward(RuntimeError):
    """A judgement failed, so there is no reward. Raised where the other trainer knows no missing rewards: an error
    can be retried or can end the run, a made-up number cannot be noticed."""


class RewardClient:
    """Scores completions on a reward server. Safe to share between threads.

    `url` and `token` come from RLME_SERVE_URL and RLME_SERVE_TOKEN where not given. A busy (503) or unreachable server
    is asked again for `patience` seconds.
    """

    def __init__(
        self, url: str | None = None, *, token: str | None = None, timeout: float = 600.0, patience: float = 300.0
    ) -> None:
        self.url = (url or os.environ.get(URL_ENV) or DEFAULT_URL).rstrip("/")
        self.timeout = timeout
        self.patience = patience
        self._token = (token or os.environ.get(TOKEN_ENV) or "").strip()
        if not (self._token.isascii() and self._token.isprintable()):
            raise RewardServerError(f"the token (`token` or {TOKEN_ENV}) must consist of printable ASCII characters")
        self._address = urlsplit(self.url)
        if self._address.scheme not in ("http", "https") or not self._address.hostname:
            raise RewardServerError(f"reward server {self.url!r}: expected http://host:port")
        self._local = threading.local()

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result per item ({prompt, completion, answer?, anchored?, columns?}): its `reward` (None: missing) and
        `judgements`."""
        results: list[dict[str, Any]] = []
        for some in batches(items):
            results += self.post("/score", {"items": [dict(item) for item in items[some]]})["results"]
        if len(results) != len(items):
            raise RewardServerError(f"{len(results)} results came back for {len(items)} completions")
        return results

    def reward(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The result of one completion; raises `MissingReward` when its reward is missing."""
        result = self.score([item])[0]
        if result["reward"] is None:
            failed = [j for j in result["judgements"] if j["failure"]]
            why = "; ".join(f"{j['evaluator']}/{j['question']}: {j['failure']} {j['detail']}".strip() for j in failed)
            raise MissingReward(f"no reward for this completion ({why or 'no known answer'})")
        return result

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST to a route of the server; the decoded reply."""
        data = _dump(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        until, pause = time.monotonic() + self.patience, 0.25
        while True:
            try:
                status, text = self._send(self._address.path + path, data, headers)
                if status == 200:
                    return json.loads(text)
                problem = f"HTTP {status}: {text[:300].decode('utf-8', 'replace')}"
                if status != 503:
                    raise RewardServerError(f"reward server {self.url}: {problem}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if time.monotonic() + pause > until:
                raise RewardServerError(f"reward server {self.url}: {problem}") from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 10.0)

    def _send(self, path: str, data: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            secure = self._address.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = kind(self._address.hostname or "", self._address.port, timeout=self.timeout)
            self._local.connection = connection
        try:
            try:
                connection.request("POST", path, data, dict(headers))
            except (BrokenPipeError, ConnectionResetError):  # a server that refuses does not read the body; hear why
                if connection.sock is None:
                    raise
            response = connection.getresponse()
            return response.status, response.read()
        except BaseException:
            connection.close()
            self._local.connection = None
            raise


def batches(items: Sequence[Any]) -> Iterator[slice]:
    """Slices of `items` that fit in one request each."""
    start = size = 0
    for i, item in enumerate(items):
        more = len(_dump(item)) + 2
        if i > start and (i - start == MAX_ITEMS or size + more > MAX_BYTES):
            yield slice(start, i)
            start, size = i, 0
        size += more
    if items:
        yield slice(start, len(items))


def known(answer: Any) -> Any:
    """A known answer as text; None where a data set has none there: None, NaN, or an empty text."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return None
    return str(answer) if str(answer).strip() else None


def plain_text(content: Any) -> Any:
    """The text of a chat message's content, which may come in parts, or be None where a turn only calls tools."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _dump(value: Any) -> str:
    """JSON. Arrays and numbers of other libraries are sent as Python's own, anything else (a date) as its text."""
    return json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))

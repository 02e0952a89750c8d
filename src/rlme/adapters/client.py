"""A client of the reward server, in the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

URL_ENV = "RLME_SERVE_URL"
TOKEN_ENV = "RLME_SERVE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8765"
MAX_ITEMS = 1024
"""Completions in one request; more are sent in several."""


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
        self._token = token or os.environ.get(TOKEN_ENV)
        self._address = urlsplit(self.url)
        if self._address.scheme not in ("http", "https") or not self._address.hostname:
            raise RewardServerError(f"reward server {self.url!r}: expected http://host:port")
        self._local = threading.local()

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result per item ({prompt, completion, answer?, anchored?, columns?}): its `reward` (None: missing) and
        `judgements`."""
        results: list[dict[str, Any]] = []
        for start in range(0, len(items), MAX_ITEMS):
            reply = self.post("/score", {"items": [dict(item) for item in items[start : start + MAX_ITEMS]]})
            results += reply["results"]
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
        data = json.dumps(body).encode()
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
            connection.request("POST", path, data, dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        except BaseException:
            connection.close()
            self._local.connection = None
            raise

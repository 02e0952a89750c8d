"""A tiny OpenAI-compatible server with a real (deterministic) language model, and a proxy that breaks its replies.

The model is a hash: logits of the next token are drawn from a generator seeded by the last tokens. Its exact
log-probabilities are known here, so that every number that arrives over HTTP can be compared with the truth.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LABELS = ("YES", " YES", "Yes", " Yes", "yes", " yes", "NO", " NO", "No", " No", "no", " no")
WORDS = (*LABELS, "ø", "<user>", "<assistant>")
BYTES = (*map(chr, range(32, 127)), "\n")
VOCABULARY = (*WORDS, *BYTES)
IDS = {piece: i for i, piece in enumerate(VOCABULARY)}
CONTEXT_LIMIT = 400


def encode(text: str) -> list[int]:
    """Longest match first."""
    ids, at = [], 0
    while at < len(text):
        piece = next((w for w in sorted(WORDS, key=len, reverse=True) if text.startswith(w, at)), text[at])
        ids.append(IDS.get(piece, IDS["?"]))
        at += len(piece)
    return ids


def render(messages: Sequence[dict[str, str]], *, prefill: bool = False) -> str:
    """The chat template; with `prefill` the last message is a begun answer."""
    turns = messages[:-1] if prefill else messages
    text = "".join(f"<{'user' if m['role'] != 'assistant' else 'assistant'}>{m['content']}\n" for m in turns)
    return text + "<assistant>" + (messages[-1]["content"] if prefill else "")


def next_logprobs(ids: Sequence[int]) -> list[float]:
    """The model: log-probabilities of all tokens after `ids`."""
    seed = hashlib.blake2b(struct.pack(f"{len(ids)}i", *ids), digest_size=8).digest()
    draw = random.Random(seed)
    logits = [draw.gauss(0, 3) for _ in VOCABULARY]
    for i in range(len(WORDS)):  # labels are likely, as they are for a model that was asked for one
        logits[i] += 10
    if "exactly this" in "".join(VOCABULARY[i] for i in ids):
        for i in ids[-2:]:
            logits[i] += 12
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def true_logprob(context: str, continuation: str) -> float:
    """What any correct evaluator must report."""
    ids, total = encode(context), 0.0
    for token in encode(continuation):
        total += next_logprobs(ids)[token]
        ids.append(token)
    return total


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


class _Fake(_Handler):
    """Dialects: vllm, vllm_ids (with logprob_token_ids), llama, sglang (its own `/generate`, as recorded from
    sglang.srt's io_struct and its users; `.leading` before every text), sglang_old (its tokenizer takes no messages),
    hosted (chat only, top 20), legacy (text only, top 5), none (refuses log-probabilities)."""

    def do_GET(self) -> None:
        s = self.server
        if not self._authorised():
            return
        if self.path == "/v1/models":
            meta = {"meta": {"n_vocab": len(VOCABULARY)}} if s.dialect == "llama" else {}
            self.reply(200, {"data": [{"id": m, "object": "model", **meta} for m in s.models]})
        elif self.path == "/props" and s.dialect == "llama":
            self.reply(200, {"default_generation_settings": {"n_ctx": CONTEXT_LIMIT}})
        else:
            self.reply(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        s = self.server
        request = json.loads(self.body())
        if not self._authorised():
            return
        with s.lock:
            s.calls[self.path] += 1
            s.bodies.append((self.path, request))
            s.active += 1
            s.most_active = max(s.most_active, s.active)
            s.started.append(time.monotonic())
        try:
            if s.delay:
                time.sleep(random.Random(str(request)).uniform(0, s.delay))
            self._route(request)
        finally:
            with s.lock:
                s.active -= 1

    def _authorised(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.reply(401, {"error": {"message": "wrong key"}})
        return False

    def _route(self, request: dict[str, Any]) -> None:
        dialect, chat = self.server.dialect, self.path == "/v1/chat/completions"
        vllm = dialect.startswith(("vllm", "sglang"))
        routes = {
            "/v1/chat/completions": ("hosted", "none", "sglang_old"),
            "/v1/completions": ("vllm", "vllm_ids", "llama", "legacy", "none", "sglang", "sglang_old"),
            "/generate": ("sglang", "sglang_old"),
        }
        if self.path == "/tokenize" and dialect == "sglang_old" and "prompt" not in request:
            self.reply(422, {"detail": [{"type": "missing", "loc": ["body", "prompt"]}]})
        elif self.path == "/tokenize" and (vllm or dialect == "llama"):
            if "messages" in request:
                text = render(request["messages"], prefill=request.get("continue_final_message", False))
            else:
                text = request["content" if dialect == "llama" else "prompt"]
            extra = {"max_model_len": CONTEXT_LIMIT} if vllm else {}
            self.reply(200, {"tokens": encode(self.server.leading + text), **extra})
        elif self.path == "/apply-template" and dialect == "llama":
            self.reply(200, {"prompt": render(request["messages"])})
        elif dialect not in routes.get(self.path, ()):
            self.reply(404, {"error": {"message": "no such route"}})
        elif dialect == "none" and request.get("logprobs"):
            self.reply(422, {"detail": "Unsupported fields in the request: {'logprobs'}"})
        elif self.path == "/generate":
            self._generate(request)
        else:
            self._complete(request, chat)

    def _generate(self, request: dict[str, Any]) -> None:
        ids = request["input_ids"]
        if len(ids) > CONTEXT_LIMIT and self.server.cut_at is None:
            detail = f"The input ({len(ids)} tokens) is longer than the model's context length ({CONTEXT_LIMIT})."
            return self.reply(400, {"error": {"message": detail}})
        ids = ids[: self.server.cut_at]
        row = next_logprobs(ids)
        drawn = max(range(len(row)), key=row.__getitem__)
        meta = {
            "id": "1", "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": len(ids),
            "completion_tokens": 1, "cached_tokens": len(ids) // 2,
            "input_token_logprobs": [], "output_token_logprobs": [[row[drawn], drawn, None]],
            "output_token_ids_logprobs": [[[row[i], i, None] for i in request["token_ids_logprob"]]],
        }  # fmt: skip
        self.reply(200, {"text": VOCABULARY[drawn], "output_ids": [drawn], "meta_info": meta})

    def _complete(self, request: dict[str, Any], chat: bool) -> None:
        s = self.server
        prompt = render(request["messages"]) if chat else request["prompt"]
        ids = encode(prompt) if isinstance(prompt, str) else list(prompt)
        wanted = request.get("top_logprobs" if chat else "logprobs") or 0
        most = {"vllm": 20, "vllm_ids": 20, "hosted": 20, "sglang_old": 20, "legacy": 5}.get(s.dialect, len(VOCABULARY))
        if wanted > most:
            return self.reply(400, {"error": {"message": f"at most {most} log-probabilities, {wanted} asked for"}})
        limit = CONTEXT_LIMIT if s.cut_at is None else 10**9
        if len(ids) > limit:
            return self.reply(400, {"error": {"message": f"the maximum context length is {limit} tokens"}})
        if s.cut_at is not None:
            ids = ids[: s.cut_at]
        text, first = [], next_logprobs(ids)
        longer = list(ids)
        for _ in range(request["max_tokens"]):
            row = next_logprobs(longer)
            longer.append(max(range(len(row)), key=row.__getitem__))
            text.append(VOCABULARY[longer[-1]])
        ranked = sorted(range(len(first)), key=lambda i: -first[i])[:wanted]
        named = request.get("logprob_token_ids") if s.dialect == "vllm_ids" else None
        if named:
            ranked = [*ranked[:1], *[i for i in named if i != ranked[0]]]
        if s.dialect == "llama" or chat:
            top = [
                {"token": VOCABULARY[i], "bytes": list(VOCABULARY[i].encode()), "logprob": first[i]}
                | ({"id": i} if s.dialect == "llama" else {})
                for i in ranked
            ]
            logprobs: Any = {"content": [{**top[0], "top_logprobs": top}]} if ranked else None
        else:
            as_id = request.get("return_tokens_as_token_ids", False)
            logprobs = {"top_logprobs": [{f"token_id:{i}" if as_id else VOCABULARY[i]: first[i] for i in ranked}]}
        answer = {"message": {"role": "assistant", "content": "".join(text)}} if chat else {"text": "".join(text)}
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": request["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": len(ids) // 2},
        }
        counted = {"usage": usage} if s.counts else {}
        self.reply(200, {"choices": [{"index": 0, "logprobs": logprobs, **answer}], **counted})


FAULTS = (
    "timeout", "rate_limit", "rate_limit_after", "error_500", "cut_body", "bad_json",
    "missing_logprobs", "nan", "wrong_choices", "slow_drip",
)  # fmt: skip
KIND = {
    "timeout": "timeout", "slow_drip": "timeout", "rate_limit": "rate_limited", "rate_limit_after": "rate_limited",
    "error_500": "server_error", "cut_body": "connection", "bad_json": "malformed", "wrong_choices": "malformed",
    "missing_logprobs": "label_missing", "nan": "not_a_number",
}  # fmt: skip
"""The kind of failure that each fault must be counted as."""


class _Proxy(_Handler):
    """Passes everything on; a share `rate` of the completions is broken in one of the ways in `faults`."""

    def do_GET(self) -> None:
        self._pass("GET", b"")

    def do_POST(self) -> None:
        s, body = self.server, self.body()
        fault = None
        if "completions" in self.path and s.faults:
            with s.lock:
                s.healthy -= 1
                if s.draw.random() < s.rate or s.healthy < 0:
                    fault = s.draw.choice(s.faults)
                    s.injected[fault] += 1
        if fault is None:
            return self._pass("POST", body)
        self._break(fault, body)

    def _fetch(self, method: str, body: bytes) -> tuple[int, bytes]:
        local = self.server.local
        for fresh in (False, True):
            if fresh or not hasattr(local, "connection"):
                local.connection = http.client.HTTPConnection(*self.server.target)
            try:
                kept = {k: v for k, v in self.headers.items() if k.lower() in ("authorization", "content-type")}
                local.connection.request(method, self.path, body, kept)
                response = local.connection.getresponse()
                return response.status, response.read()
            except (http.client.HTTPException, OSError):
                if fresh:
                    raise
        raise AssertionError

    def _pass(self, method: str, body: bytes) -> None:
        self.reply(*self._fetch(method, body))

    def _break(self, fault: str, body: bytes) -> None:
        if fault == "rate_limit":
            return self.reply(429, {"error": {"message": "slow down"}})
        if fault == "rate_limit_after":
            return self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.02"})
        if fault == "error_500":
            return self.reply(500, b"oops", {"Content-Type": "text/plain"})
        if fault == "bad_json":
            return self.reply(200, b'{"choices": [{"text": "Y')
        if fault == "timeout":
            self.close_connection = True
            self.server.stopping.wait(self.server.hold)
            return None
        status, data = self._fetch("POST", body)
        reply = json.loads(data)
        if fault == "missing_logprobs":
            reply["choices"][0]["logprobs"] = None
        elif fault == "nan":
            reply["choices"][0]["logprobs"] = _with_nan(reply["choices"][0]["logprobs"])
        elif fault == "wrong_choices":
            reply["choices"] = reply["choices"] * random.Random(data).choice((0, 2))
        else:  # the body is right, but does not arrive, or not in time
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "cut_body":
                self.wfile.write(data[: len(data) // 2])
                return None
            end = time.monotonic() + self.server.hold
            for byte in data:
                if time.monotonic() > end or self.server.stopping.wait(0.05):
                    return None
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    return None
            return None
        return self.reply(status, reply)


def _with_nan(logprobs: Any) -> Any:
    if isinstance(logprobs, dict):
        return {k: _with_nan(v) for k, v in logprobs.items()}
    if isinstance(logprobs, list):
        return [_with_nan(v) for v in logprobs]
    return math.nan if isinstance(logprobs, float) else logprobs


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a held connection must not hold the test
    request_queue_size = 512

    def handle_error(self, *_: Any) -> None:  # a client that hangs up is what these tests are about
        pass


@contextmanager
def _running(handler: type[_Handler], **state: Any) -> Iterator[Any]:
    server = _Server(("127.0.0.1", 0), handler)
    server.stopping = threading.Event()  # type: ignore[attr-defined]
    server.lock = threading.Lock()  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}/v1"  # type: ignore[attr-defined]
    for name, value in state.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


@contextmanager
def fake_endpoint(
    dialect: str = "vllm_ids", *, models: Sequence[str] = ("tiny",), key: str | None = None
) -> Iterator[Any]:
    """A running server: `.url`, `.calls` by path, `.bodies`, `.most_active`; set `.delay` (s) or `.cut_at` (tokens)."""
    state: dict[str, Any] = {"calls": Counter(), "bodies": [], "started": [], "active": 0, "most_active": 0}
    more: dict[str, Any] = {"delay": 0.0, "cut_at": None, "leading": "", "counts": True}
    with _running(_Fake, dialect=dialect, models=models, key=key, **more, **state) as server:
        yield server


@contextmanager
def faulty_proxy(url: str, *faults: str, rate: float = 0.3, hold: float = 5.0, seed: int = 0) -> Iterator[Any]:
    """A proxy in front of `url`: `.injected` counts faults by name; clear `.faults` to stop them; after `.healthy`
    further calls it breaks everything."""
    address = urlsplit(url)
    state: dict[str, Any] = {"target": (address.hostname, address.port), "faults": list(faults), "injected": Counter()}
    draw = random.Random(seed)
    with _running(_Proxy, rate=rate, hold=hold, draw=draw, healthy=10**9, local=threading.local(), **state) as server:
        yield server

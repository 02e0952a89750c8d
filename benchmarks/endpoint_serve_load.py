"""The reward server under many clients: errors, latency, memory.

    python benchmarks/endpoint_serve_load.py --clients 200 --seconds 60 --json serve.json

The server runs in a process of its own with an evaluator that answers every batch after a fixed time, so that what is
measured is the server: HTTP, validation, batching, templates, read-outs. Clients run in this process, each with one
connection and one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlme.judgement import Answer, Failure, Message, Request

QUESTIONS = {"right": "Is the answer correct?", "kind": "Is it polite?"}


class Steady:
    """Answers every batch after `seconds`; each log-probability follows from the text alone."""

    name, chat = "steady", True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, all after the same time."""
        time.sleep(self.seconds)
        return [self.answer(r) for r in requests]

    def answer(self, request: Request) -> Answer:
        """Log-probabilities drawn from a hash of the context."""
        draw = random.Random(str(request.context))
        return Answer(tuple(-1 - 3 * draw.random() for _ in request.continuations))

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        """No critiques here."""
        return ["" for _ in requests]

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """All of them."""
        return tuple(c for c in candidates if not c.startswith(" "))

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        """Unknown."""
        return None


def serve(port: int, seconds: float) -> None:
    """The server process."""
    import uvicorn

    from rlme.reward import MetaReward
    from rlme.serve.app import create_app
    from rlme.serve.batcher import scorer

    scorers = [scorer(MetaReward(QUESTIONS, [Steady(seconds)])) for _ in range(4)]
    uvicorn.run(create_app(scorers), port=port, log_level="error")


async def client(number: int, port: int, until: float, seen: Counter[str], latencies: list[float]) -> None:
    """One connection: send, check, repeat."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    draw = random.Random(number)
    while time.monotonic() < until:
        n = draw.randint(1, 8)
        items = [{"prompt": "Why?", "completion": f"{number} {draw.random()} " + "text " * 60} for _ in range(n)]
        body = json.dumps({"items": items}).encode()
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        length = 0
        while (line := await reader.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        reply = json.loads(await reader.readexactly(length))
        latencies.append(time.perf_counter() - began)
        seen[f"http_{status}"] += 1
        if status == 200:
            seen["completions"] += n
            if len(reply["results"]) != n or any(r["reward"] is None for r in reply["results"]):
                seen["wrong"] += 1
    writer.close()


def memory_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024


async def load(args: argparse.Namespace, pid: int) -> dict[str, Any]:
    """All clients at once; memory is read every second."""
    seen: Counter[str] = Counter()
    latencies: list[float] = []
    memory: list[float] = [memory_mb(pid)]
    until = time.monotonic() + args.seconds
    tasks = [asyncio.create_task(client(i, args.port, until, seen, latencies)) for i in range(args.clients)]
    while time.monotonic() < until:
        await asyncio.sleep(1)
        memory.append(memory_mb(pid))
    await asyncio.gather(*tasks)
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        "evaluator_ms": args.evaluator_ms,
        "requests": len(latencies),
        "requests_per_second": len(latencies) / args.seconds,
        "completions_per_second": seen["completions"] / args.seconds,
        "outcomes": dict(seen),
        "latency_ms": {f"p{q}": round(1000 * cuts[q - 1], 1) for q in (50, 90, 95, 99)}
        | {"max": round(1000 * max(latencies), 1)},
        "memory_mb": {
            "start": round(memory[0]),
            "after_10_s": round(memory[min(10, len(memory) - 1)]),
            "peak": round(max(memory)),
            "end": round(memory[-1]),
        },
    }


def main() -> None:
    """Start the server, load it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--evaluator-ms", type=float, default=50)
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(args.port, args.evaluator_ms / 1000), daemon=True
    )
    server.start()
    for _ in range(300):
        try:
            asyncio.run(_connect(args.port))
            break
        except OSError:
            time.sleep(0.1)
    assert server.pid is not None
    result = asyncio.run(load(args, server.pid))
    server.terminate()
    server.join(30)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


async def _connect(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


if __name__ == "__main__":
    main()

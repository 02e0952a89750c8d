"""A thousand judgements through every fault of a broken network, one kind at a time and all mixed.

    python benchmarks/endpoint_faults.py --n 1000 --json faults.json                          # the tests' own server
    python benchmarks/endpoint_faults.py --n 1000 --url http://127.0.0.1:8080/v1 --tolerance 0.02   # a real one

A proxy breaks 30 % of the calls. Every answer is compared with the one that came without the proxy: a wrong number is a
bug, a failure is counted by its kind. With enough retries no judgement may be missing at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fake_endpoint import FAULTS, fake_endpoint, faulty_proxy

from rlme.evaluators import endpoint_client
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.judgement import Request

LABELS = (" Yes", " No")


@contextmanager
def target(url: str | None) -> Iterator[str]:
    """The given server, or the tests' own."""
    if url is not None:
        yield url
        return
    with fake_endpoint("vllm_ids") as server:
        yield server.url


def main() -> None:
    """Reference answers, then every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--url", default=None)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds; what hangs or drips costs this much")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--contexts", type=int, default=None, help="distinct contexts (default: all)")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="servers round differently in other batches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    endpoint_client.FIRST_PAUSE, endpoint_client.LONGEST_PAUSE = 0.02, 0.2
    distinct = args.contexts or args.n
    requests = [
        Request(f"Is this number even? Answer Yes or No. Number: {i % distinct}. Answer:", LABELS)
        for i in range(args.n)
    ]
    results: dict[str, Any] = {"n": args.n, "rate": args.rate}

    def evaluator(url: str, **config: Any) -> EndpointEvaluator:
        return EndpointEvaluator(EndpointConfig(base_url=url, concurrency=args.concurrency, **config))

    with target(args.url) as url:
        plain = evaluator(url)
        results["server"] = plain.summary
        began = time.perf_counter()
        reference = [answer.logprobs for answer in plain.logprobs(requests)]
        print(f"{plain.summary}\nwithout faults: {time.perf_counter() - began:.1f} s")
        plain.close()
        for name, faults in {**{fault: (fault,) for fault in FAULTS}, "mixed": FAULTS}.items():
            with faulty_proxy(url, rate=args.rate, hold=5 * args.deadline) as proxy:
                judge = evaluator(proxy.url, deadline=args.deadline, retries=20)
                proxy.faults[:] = faults
                began = time.perf_counter()
                answers = judge.logprobs(requests)
                differences = [
                    max(abs(x - y) for x, y in zip(answer.logprobs, true or (), strict=True))
                    for answer, true in zip(answers, reference, strict=True)
                    if answer.logprobs is not None
                ]
                row = {
                    "seconds": round(time.perf_counter() - began, 1),
                    "injected": sum(proxy.injected.values()),
                    "failed_attempts": {k.value: n for k, n in sorted(judge.account.failures.items())},
                    "missing": sum(a.failure is not None for a in answers),
                    "wrong": sum(difference > args.tolerance for difference in differences),
                    "largest_difference": max(differences, default=0.0),
                }
                judge.close()
            results[name] = row
            print(name, json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Judging through llama-server with its prefix cache on and off.

    python benchmarks/endpoint_prefix_cache.py --url http://127.0.0.1:8080/v1 --data judged.jsonl --n 16

Several questions about each completion, the question last, so that everything before it is shared. The server must be
fresh: what it has judged before would be in its cache.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.judging import Judging, Sample, judge
from rlme.questions import Question

QUESTIONS = (
    "Is the answer correct?",
    "Is every calculation right?",
    "Are all numbers of the problem used?",
    "Is the solution easy to follow?",
)


def main() -> None:
    """On first, while its cache is empty; the calls of off leave the cache aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--n", type=int, default=16, help="completions")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.open()][: args.n]
    samples = [Sample(row["question"], row["solution"]) for row in rows]
    questions = [Question(text) for text in QUESTIONS]
    results: dict[str, Any] = {"completions": len(samples), "questions": len(questions)}
    for name, body in (("on", {"cache_prompt": True}), ("off", {"cache_prompt": False})):
        evaluator = EndpointEvaluator(
            EndpointConfig(base_url=args.url, concurrency=args.concurrency, deadline=300, extra_body=body)
        )
        began = time.perf_counter()
        judge(samples, questions, [evaluator], Judging(template="judge", readout="yes_no"))
        seconds = time.perf_counter() - began
        account = evaluator.account
        results[name] = {
            "seconds": round(seconds, 1),
            "judgements_per_second": round(len(samples) * len(questions) / seconds, 2),
            "calls": account.calls,
            "tokens_in": account.tokens_in,
            "tokens_cached": account.tokens_cached,
        }
        evaluator.close()
        print(name, results[name])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

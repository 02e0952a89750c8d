"""Are the log-probabilities of a served model those of the same weights in this process?

Start a server (docs/endpoints.md), then

    python benchmarks/endpoint_equality.py --url http://127.0.0.1:8080/v1 --model model.gguf --data judged.jsonl

`--data` is a JSONL file with a question and a solution in each row. Every row is judged twice by text (marker read-out,
labels of two tokens) and by chat (yes_no), through HTTP and in process, and the log-probabilities are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rlme.evaluators.build import model_evaluator
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.evaluators.endpoint_config import EndpointConfig
from rlme.judgement import Judgement
from rlme.judging import Judging, Sample, judge
from rlme.questions import Question

QUESTION = Question("Is the answer correct?", "correct")


def main() -> None:
    """Judge, compare, print, and write the numbers to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="the same weights: .gguf, folder or hub id")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--n", type=int, default=100, help="rows; each is judged by text and by chat")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--note", default="", help="stored with the numbers, e.g. the precision of the server")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.data.open()][: args.n]
    samples = [Sample(row["question"] + "\n", row["solution"]) for row in rows]
    remote = EndpointEvaluator(EndpointConfig(base_url=args.url, concurrency=args.concurrency, deadline=300))
    print(remote.summary)
    local = model_evaluator(args.model, dtype="float32")
    results: dict[str, Any] = {"note": args.note, "server": remote.summary, "judgements": 2 * len(samples)}
    for template in ("paper", "chat"):
        ways = []
        for evaluator in (remote, local):
            began = time.perf_counter()
            verdicts = [row[0] for row in judge(samples, [QUESTION], [evaluator], Judging(template=template))]
            seconds = time.perf_counter() - began
            results[f"{template}_{'http' if evaluator is remote else 'process'}_s"] = round(seconds, 1)
            ways.append(verdicts)
        results[template] = _compare(*ways)
        print(template, results[template])
    results["account"] = remote.account.metrics()
    print(json.dumps(results["account"]))
    remote.close()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def _compare(remote: list[Judgement], local: list[Judgement]) -> dict[str, float]:
    pairs = [(r, p) for r, p in zip(remote, local, strict=True) if not r.failed and not p.failed]
    logprob = [abs(r.logprobs[label] - p.logprobs[label]) for r, p in pairs for label in p.logprobs]
    score = [abs((r.score or 0.0) - (p.score or 0.0)) for r, p in pairs]
    return {
        "compared": len(pairs),
        "failed": len(remote) - len(pairs),
        "logprob_max_difference": max(logprob),
        "logprob_median_difference": statistics.median(logprob),
        "score_max_difference": max(score),
        "same_verdict": sum(
            (r.logprobs["YES"] > r.logprobs["NO"]) == (p.logprobs["YES"] > p.logprobs["NO"]) for r, p in pairs
        )
        / len(pairs),
    }


if __name__ == "__main__":
    main()

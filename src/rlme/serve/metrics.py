"""What the reward server tells Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rlme.evaluators.base import Evaluator
from rlme.evaluators.spending import paid

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, evaluators: Sequence[Evaluator] = ()) -> None:
        self._accounts = {evaluator.name: evaluator.account for evaluator in paid(evaluators)}
        self._booked: dict[str, dict[str, float]] = {}
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("rlme_requests", "Requests answered, by status", ["status"], registry=r)
        self.completions = Counter("rlme_completions", "Completions judged", registry=r)
        self.missing = Counter("rlme_rewards_missing", "Completions without a reward", registry=r)
        self.failures = Counter(
            "rlme_judgement_failures", "Failed judgements", ["evaluator", "question", "kind"], registry=r
        )
        self.tokens = Counter("rlme_evaluator_tokens", "Tokens of the evaluators", ["evaluator", "way"], registry=r)
        self.cost = Counter("rlme_evaluator_cost", "Money spent on evaluators", ["evaluator"], registry=r)
        self.latency = Histogram("rlme_request_seconds", "Time to answer a request", buckets=_SECONDS, registry=r)
        self.batch = Histogram(
            "rlme_batch_completions", "Completions judged together", buckets=(1, 4, 16, 64, 256, 1024), registry=r
        )
        self.batch_seconds = Histogram("rlme_batch_seconds", "Time to judge a batch", buckets=_SECONDS, registry=r)
        self.waiting = Gauge("rlme_waiting_completions", "Completions taken in and not yet answered", registry=r)

    def answered(self, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(str(status)).inc()
        self.latency.observe(seconds)

    def judged(self, rows: Sequence[dict[str, Any]]) -> None:
        """Count what was judged for one request."""
        self.completions.inc(len(rows))
        self.missing.inc(sum(row["reward"] is None for row in rows))
        for row in rows:
            for j in row["judgements"]:
                if j["failure"]:
                    self.failures.labels(j["evaluator"], j["question"], j["failure"]).inc()
                if j["evaluator"] not in self._accounts:
                    self._spend(j["evaluator"], j)

    def _spend(self, evaluator: str, amounts: Mapping[str, float]) -> None:
        for way in ("in", "cached", "out"):
            self.tokens.labels(evaluator, way).inc(amounts[f"tokens_{way}"])
        self.cost.labels(evaluator).inc(amounts["cost"])

    def text(self) -> bytes:
        """The exposition format. An account knows what failed and repeated attempts took, which no judgement tells."""
        for name, account in self._accounts.items():
            now, before = account.metrics(), self._booked.get(name, {})
            self._spend(name, {key: max(0.0, value - before.get(key, 0.0)) for key, value in now.items()})
            self._booked[name] = now
        return generate_latest(self.registry)

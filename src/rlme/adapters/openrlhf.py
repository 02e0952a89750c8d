"""OpenRLHF: a reward file, for where `--reward.remote_url http://judge:8765/openrlhf` does not fit.

    --reward.remote_url .../rlme/adapters/openrlhf.py     (address and token: RLME_SERVE_URL, RLME_SERVE_TOKEN)

OpenRLHF retries an HTTP server that refuses five times and an exception here not at all; either way a completion
without a reward has `None`, and it stops instead of training on a made-up number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlme.adapters.client import RewardClient, batches

_client: RewardClient | None = None


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """Rewards, scores and extra logs of a batch (each query is prompt and completion in one text)."""
    global _client
    _client = _client or RewardClient()
    parts: list[dict[str, Any]] = []
    for some in batches(list(zip(queries, prompts, labels, strict=True))):
        body = {"query": list(queries[some]), "prompts": list(prompts[some]), "labels": list(labels[some])}
        parts.append(_client.post("/openrlhf", body))
    names = dict.fromkeys(name for part in parts for name in part["extra_logs"])
    return {
        "rewards": [r for part in parts for r in part["rewards"]],
        "scores": [s for part in parts for s in part["scores"]],
        "extra_logs": {name: [v for part in parts for v in part["extra_logs"].get(name, [])] for name in names},
    }

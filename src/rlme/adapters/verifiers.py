"""verifiers (v1), and prime-rl through it: a reward plugged into any task by configuration.

    [env.taskset.task.rewards.rlme]
    fn = "rlme.adapters.verifiers:rlme_reward"
    weight = 1.0

The server's address and token come from RLME_SERVE_URL and RLME_SERVE_TOKEN. A missing reward raises, which verifiers
records as an error of the rollout: it is retried or dropped, never scored.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlme.adapters.client import RewardClient, known

_client: RewardClient | None = None
_threads = ThreadPoolExecutor(64, thread_name_prefix="rlme-verifiers")


async def rlme_reward(task: Any, trace: Any) -> float:
    """The reward of a rollout's last reply. `task` is the task's data, `trace` the rollout; the questions'
    probabilities become metrics of the trace."""
    global _client
    _client = _client or RewardClient()
    item = {
        "prompt": task.prompt_text,
        "completion": trace.last_reply or "",
        "answer": known(getattr(task, "answer", None)),
    }
    result = await asyncio.get_running_loop().run_in_executor(_threads, _client.reward, item)
    for j in result["judgements"]:
        if j["probability"] is not None:
            trace.record_metric(f"rlme/{j['evaluator']}/{j['question']}", j["probability"])
    return float(result["reward"])

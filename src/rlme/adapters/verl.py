"""verl: `custom_reward_function`, asynchronous.

    reward.custom_reward_function.path=pkg://rlme.adapters.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.url=http://judge:8765
    +reward.custom_reward_function.reward_kwargs.prompt_key=question

verl does not hand the prompt to a reward function, so it is read from `extra_info[prompt_key]`. Use the reward manager
`naive` or `dapo`: an error of this function ends the run there, while `rate_limited` makes every error a score of 0.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlme.adapters.client import RewardClient, known

_clients: dict[str | None, RewardClient] = {}
_threads = ThreadPoolExecutor(64, thread_name_prefix="rlme-verl")


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    url: str | None = None,
    prompt_key: str = "question",
    columns: tuple[str, ...] = (),
    **_: Any,
) -> dict[str, float]:
    """The reward as `score`, and each question's probability under `evaluator/question`.

    Raises `MissingReward` where there is none: verl knows no missing rewards, and 0 would be a score.
    `columns`: keys of `extra_info` that the server's templates use.
    """
    extra = extra_info or {}
    prompt = extra.get(prompt_key)
    if prompt is None:
        raise KeyError(
            f"extra_info has no {prompt_key!r} ({data_source}); set reward_kwargs.prompt_key to the prompt's key"
        )
    if missing := [name for name in columns if name not in extra]:
        raise KeyError(f"extra_info has no {missing[0]!r} ({data_source}), which reward_kwargs.columns names")
    item = {
        "prompt": prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt],
        "completion": solution_str,
        "answer": known(ground_truth),
        "columns": {name: extra[name] for name in columns},
    }
    if url not in _clients:
        _clients[url] = RewardClient(url)
    result = await asyncio.get_running_loop().run_in_executor(_threads, _clients[url].reward, item)
    scores = {"score": float(result["reward"])}
    for j in result["judgements"]:
        # Every sample must bring the same keys; a held-out question that failed is no number.
        scores[f"{j['evaluator']}/{j['question']}"] = float("nan") if j["probability"] is None else j["probability"]
    return scores

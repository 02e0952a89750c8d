"""Whole training runs judged over HTTP: faults that pass leave no trace, an outage stops with the state saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from rlme.commands import read_config
from rlme.errors import RunStopped
from rlme.evaluators import endpoint_client
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.training import trainer as trainer_module
from rlme.training.run import train
from rlme.training.run_folder import RunFolder
from tests.fake_endpoint import FAULTS, fake_endpoint, faulty_proxy
from tests.tiny_runs import is_timing, read_metrics, read_rollouts, write_config

QUICK = tuple(fault for fault in FAULTS if fault not in ("timeout", "slow_drip"))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(endpoint_client, "LONGEST_PAUSE", 0.02)


def run(folder: Path, model: Path, url: str, **endpoint: Any) -> RunFolder:
    folder.mkdir()
    evaluator = {"name": "judge", "endpoint": {"base_url": url, "retries": 20, **endpoint}}
    path = write_config(folder, model, evaluators=[evaluator], train={"steps": 3, "checkpoint_every": 1})
    return train(read_config(str(path)), Console(quiet=True))


def numbers(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(folder.path)]


def rewards(folder: RunFolder) -> list[float]:
    return [row["reward"] for row in read_rollouts(folder.path)]


def same_weights(a: RunFolder, b: RunFolder) -> bool:
    ours, theirs = (load_file(f.final / "model.safetensors") for f in (a, b))
    return all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_through_faults_equals_the_run_without(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with fake_endpoint("vllm_ids") as server, faulty_proxy(server.url, *QUICK, rate=0.0) as proxy:
        plain = run(tmp_path / "plain", tiny_policy_dir, server.url)
        assert len(rewards(plain)) == 18 and all(r is not None and r < 0 for r in rewards(plain))
        proxy.rate = 0.3
        # The proxy breaks the probe's calls too: what it asks is asked again.
        broken = run(tmp_path / "broken", tiny_policy_dir, proxy.url)
    assert sum(proxy.injected.values()) > 10
    assert rewards(broken) == rewards(plain)
    assert same_weights(plain, broken)


def test_judging_begins_while_sampling_goes_on(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first completion to be finished is asked about before the others are; nothing is asked twice."""
    early: list[bool] = []
    plain_sample = trainer_module.sample

    def watched(*args: Any, on_finished: Any, **options: Any) -> Any:
        before = asked()

        def told(*which: Any) -> None:
            on_finished(*which)
            deadline = time.monotonic() + 20
            while asked() == before and time.monotonic() < deadline:
                time.sleep(0.01)

        found = plain_sample(*args, on_finished=told, **options)
        early.append(asked() > before)
        return found

    with fake_endpoint("vllm_ids") as server:

        def asked() -> int:
            return int(server.calls["/v1/completions"])

        monkeypatch.setattr(trainer_module, "sample", watched)
        begun = run(tmp_path / "begun", tiny_policy_dir, server.url)
        calls = asked()
        monkeypatch.setattr(trainer_module, "sample", plain_sample)
        monkeypatch.delattr(EndpointEvaluator, "begin")
        plain = run(tmp_path / "plain", tiny_policy_dir, server.url)
        assert asked() == 2 * calls
    assert early == [True] * 3
    assert numbers(begun) == numbers(plain)
    assert rewards(begun) == rewards(plain) and same_weights(begun, plain)


def test_an_outage_stops_the_run_which_resumes_to_the_same_end(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with fake_endpoint("vllm_ids") as server, faulty_proxy(server.url, "error_500", rate=0.0) as proxy:
        before = proxy.healthy
        plain = run(tmp_path / "plain", tiny_policy_dir, proxy.url)
        proxy.healthy = before - proxy.healthy - 5  # gone during the last step
        with pytest.raises(RunStopped, match="has not answered"):
            run(tmp_path / "stopped", tiny_policy_dir, proxy.url, outage=0.3, retries=1)
        proxy.faults.clear()
        folder = RunFolder.open(tmp_path / "stopped" / "run")
        assert folder.last_checkpoint()[0] == 2
        train(_resumed(folder), Console(quiet=True), resume=folder)
    assert rewards(folder) == rewards(plain)
    assert same_weights(plain, folder)


def _resumed(folder: RunFolder) -> Any:
    from rlme.config import Config
    from rlme.config_file import read_yaml, validate

    content = read_yaml(folder.config)
    content.pop("run_info", None)
    return validate(Config, content, str(folder.config))

"""Whole training runs judged over HTTP: faults that pass leave no trace, an outage stops with the state saved."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from rlme.commands import read_config
from rlme.config import EvaluatorConfig
from rlme.errors import RunStopped
from rlme.evaluators import endpoint_client
from rlme.evaluators.endpoint import EndpointEvaluator
from rlme.training import trainer as trainer_module
from rlme.training.build import share_of
from rlme.training.run import train
from rlme.training.run_folder import RunFolder
from tests.fake_endpoint import FAULTS, fake_endpoint, faulty_proxy
from tests.tiny_runs import is_timing, read_metrics, read_rollouts, write_config

QUICK = tuple(fault for fault in FAULTS if fault not in ("timeout", "slow_drip"))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(endpoint_client, "LONGEST_PAUSE", 0.02)


def run(folder: Path, model: Path, url: str, *, console: Console | None = None, **endpoint: Any) -> RunFolder:
    folder.mkdir()
    evaluator = {"name": "judge", "endpoint": {"base_url": url, "retries": 20, **endpoint}}
    path = write_config(folder, model, evaluators=[evaluator], train={"steps": 3, "checkpoint_every": 1})
    return train(read_config(str(path)), console or Console(quiet=True))


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


def test_money_is_estimated_forecast_and_capped_across_resumes(tiny_policy_dir: Path, tmp_path: Path) -> None:
    prices = {"input": 10.0, "cached_input": 5.0, "output": 100.0}
    output = io.StringIO()
    console = Console(file=output, width=500)
    with fake_endpoint("vllm_ids") as server:
        plain = run(tmp_path / "plain", tiny_policy_dir, server.url, console=console, prices=prices)
        spent = plain.read_spent()["judge"]
        assert spent["cost"] == pytest.approx(sum(line["endpoint/judge/cost"] for line in read_metrics(plain.path)))
        before, after = (line for line in output.getvalue().splitlines() if line.startswith("judge: "))
        most = re.search(r"at most ([\d,]+) prompt tokens and 36 gen.* 3 steps to come .* cost of at most (.+)", before)
        assert most is not None and int(most[1].replace(",", "")) >= spent["tokens_in"]
        assert spent["cost"] <= float(most[2]) < 3 * spent["cost"]
        about = re.search(
            r"about [\d,]+ prompt tokens .*cached.* 2 steps to come .as the first step.*about (.+)", after
        )
        assert about is not None and float(about[1]) == pytest.approx(2 / 3 * spent["cost"], rel=0.2)

        cap = 0.7 * spent["cost"]
        with pytest.raises(RunStopped, match="max_cost"):
            run(tmp_path / "capped", tiny_policy_dir, server.url, console=console, prices=prices, max_cost=cap)
        assert "may stop, resumable, after" in output.getvalue()
        folder = RunFolder.open(tmp_path / "capped" / "run")
        for _ in range(2):  # what was spent before counts
            assert cap * 0.8 < folder.read_spent()["judge"]["cost"] <= cap
            with pytest.raises(RunStopped, match="max_cost"):
                train(_resumed(folder), console, resume=folder)
        config = _resumed(folder)
        endpoint = config.evaluators[0].endpoint.model_copy(update={"max_cost": 2 * spent["cost"]})
        config.evaluators[0].endpoint = endpoint
        train(config, console, resume=folder)
        assert "as 2 steps went" in output.getvalue()
        assert folder.read_spent()["judge"]["cost"] >= spent["cost"]  # the step that was cut off is paid twice
    assert same_weights(plain, folder)


def test_each_process_has_its_share_of_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = {"base_url": "http://host/v1", "concurrency": 10, "requests_per_minute": 60.0}
    spec = EvaluatorConfig.model_validate({"name": "judge", "endpoint": endpoint})
    assert share_of(spec) is spec
    monkeypatch.setenv("WORLD_SIZE", "4")
    mine = share_of(spec).endpoint
    assert mine is not None and (mine.concurrency, mine.requests_per_minute, mine.max_cost) == (2, 15.0, None)


def _resumed(folder: RunFolder) -> Any:
    from rlme.config import Config
    from rlme.config_file import read_yaml, validate

    content = read_yaml(folder.config)
    content.pop("run_info", None)
    return validate(Config, content, str(folder.config))

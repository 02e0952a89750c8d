"""What judges behind endpoints take outside plain RLME runs: said before, capped, kept."""

import io
import json
import re

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from rlme.align.pipeline import Alignment
from rlme.commands import read_config
from rlme.errors import RunStopped
from rlme.judgebench.cli import judge_bench
from rlme.training.run import train
from tests import fake_endpoint as fake
from tests.fake_endpoint import fake_endpoint
from tests.test_align import tiny_config
from tests.test_judgebench import pair, write_rows
from tests.tiny_runs import write_config


@pytest.fixture(autouse=True)
def _long_contexts(monkeypatch):
    monkeypatch.setattr(fake, "CONTEXT_LIMIT", 8192)


PRICES = {"input": 10.0, "output": 100.0}


def numbers(how: str, where: str, said: str) -> tuple[int, float]:
    """Prompt tokens and cost of the announcement."""
    found = re.search(rf"judge: {how} ([\d,]+) prompt tokens .*{where}.*cost of {how} ([\d.e-]+)", said)
    assert found is not None, said
    return int(found[1].replace(",", "")), float(found[2])


def test_a_benchmark_says_what_it_takes_and_stops_at_the_cap(tmp_path):
    app = typer.Typer()
    app.command()(judge_bench)
    pairs = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(20)])

    def ask(url, folder, **endpoint):
        judge = {"name": "judge", "endpoint": {"base_url": url, "prices": PRICES, **endpoint}}
        arguments = ["--data", pairs, "--resamples", "10", "-o", str(tmp_path / folder)]
        arguments += ["--set", f"judges={json.dumps([judge])}"]
        return CliRunner().invoke(app, arguments)

    with fake_endpoint("vllm_ids") as server:
        whole = ask(server.url, "whole")
        assert whole.exit_code == 0, whole.output
        spent = json.loads((tmp_path / "whole" / "spent.json").read_text())["judge"]
        tokens, cost = numbers("about", "in these runs", whole.output)
        assert tokens == pytest.approx(spent["tokens_in"], rel=0.1) and cost >= 0.9 * spent["cost"] > 0
        cap = 0.6 * spent["cost"]
        said = []
        for _ in range(3):  # what an earlier start has spent counts
            stopped = ask(server.url, "capped", max_cost=cap)
            said.append(stopped.output.replace("\n", " "))
            assert isinstance(stopped.exception, RunStopped) and "max_cost" in str(stopped.exception)
            kept = json.loads((tmp_path / "capped" / "spent.json").read_text())["judge"]
            assert 0.5 * cap < kept["cost"] <= cap
        assert "so it may stop after" in said[0]  # later ones have no money for so much as a probe
        assert ask(server.url, "capped", max_cost=3 * spent["cost"]).exit_code == 0
    found = [json.loads((tmp_path / name / "results.json").read_text())["runs"] for name in ("capped", "whole")]
    assert found[0][0]["metrics"] == found[1][0]["metrics"]


def test_an_alignment_says_what_it_takes_and_keeps_account(tmp_path, tiny_policy_dir, monkeypatch):
    monkeypatch.setattr("rlme.align.train.dpo", lambda *arguments: {})
    said = io.StringIO()

    def align(url, name, **endpoint):
        judge = {"name": "judge", "endpoint": {"base_url": url, "prices": PRICES, **endpoint}}
        config = tiny_config(
            tmp_path,
            tiny_policy_dir,
            judge={"evaluators": [judge]},
            sft=None,
            compare=None,
            output=str(tmp_path / name),
        )
        Alignment(config, Console(file=said, width=500)).run()
        return json.loads((tmp_path / name / "spent.json").read_text())["judge"]

    with fake_endpoint("vllm_ids") as server:
        spent = align(server.url, "whole")
        before = server.calls["/v1/completions"]
        assert align(server.url, "whole")["calls"] == spent["calls"]  # everything was there
        assert server.calls["/v1/completions"] - before <= 3  # the probe
        most, _ = numbers("at most", "in the whole run", said.getvalue())
        about, cost = numbers("about", "in this stage", said.getvalue())
        assert said.getvalue().count("in the whole run") == 1
        assert most >= spent["tokens_in"] and about == pytest.approx(spent["tokens_in"], rel=0.1) and cost > 0
        for _ in range(2):
            with pytest.raises(RunStopped, match="max_cost"):
                align(server.url, "capped", max_cost=0.5 * cost)
        assert re.search("so it may stop after [45].% of them", said.getvalue())
        kept = json.loads((tmp_path / "capped" / "spent.json").read_text())["judge"]
        assert 0.3 * cost < kept["cost"] <= 0.5 * cost
        assert align(server.url, "capped", max_cost=2 * cost)["cost"] >= spent["cost"] * 0.9


def test_pairwise_training_is_estimated_too(tmp_path, tiny_policy_dir):
    said = io.StringIO()
    with fake_endpoint("vllm_ids") as server:
        judge = {"name": "judge", "endpoint": {"base_url": server.url, "prices": PRICES}}
        path = write_config(
            tmp_path,
            tiny_policy_dir,
            evaluators=[judge],
            questions={},
            reward={"mode": "pairwise", "pairwise": {"protocol": "base"}},
            train={"steps": 2},
        )
        folder = train(read_config(str(path)), Console(file=said, width=500))
    most, cost = numbers("at most", "in the 2 steps to come", said.getvalue())
    spent = folder.read_spent()["judge"]
    assert 4 * spent["tokens_in"] > most >= spent["tokens_in"] and cost >= spent["cost"]

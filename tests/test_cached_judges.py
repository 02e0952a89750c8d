"""`judging.cache` in `rlme align` and `rlme judge-bench`: fixed judges are asked once, the policy always."""

import json

import pytest
import typer
from typer.testing import CliRunner

from rlme.evaluators.cache import JudgeCache
from rlme.evaluators.local import LocalEvaluator
from rlme.judgebench.cli import judge_bench
from tests.test_align import run, tiny_config
from tests.test_judgebench import pair, write_rows


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Sizes of the calls that reached a model."""
    sizes: list[int] = []
    original = LocalEvaluator.logprobs

    def spy(self, requests):
        if requests:
            sizes.append(len(requests))
        return original(self, requests)

    monkeypatch.setattr(LocalEvaluator, "logprobs", spy)
    return sizes


def test_a_benchmark_asks_once(tmp_path, tiny_policy_dir, asked):
    app = typer.Typer()
    app.command()(judge_bench)
    pairs = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(3)])
    found = []
    for name in ("first", "second"):
        arguments = ["--judge", str(tiny_policy_dir), "--data", pairs, "--resamples", "10", "-o", str(tmp_path / name)]
        arguments += ["--set", f"judging={{cache: {tmp_path / 'judge.sqlite'}}}"]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        found.append(json.loads((tmp_path / name / "results.json").read_text())["runs"][0]["metrics"])
    assert sum(asked) == 6 and found[0] == found[1]


def test_an_alignment_asks_other_models_once_and_the_policy_always(tmp_path, tiny_policy_dir, asked, monkeypatch):
    monkeypatch.setattr("rlme.align.train.dpo", lambda *arguments: {})  # nothing after the judging matters here
    cache = tmp_path / "judge.sqlite"
    for evaluator, whole in (("live", 2), (str(tiny_policy_dir), 1)):
        asked.clear()
        for name in ("first", "second"):
            judge = {"evaluators": [evaluator], "schedule": "ordered", "judging": {"cache": str(cache)}}
            config = tiny_config(tmp_path, tiny_policy_dir, judge=judge, sft=None, compare=None)
            run(config.model_copy(update={"output": str(tmp_path / evaluator.replace("/", "_") / name)}))
        assert sum(asked) == whole * 6 * 6  # prompts x ordered pairs
        assert cache.exists() == (evaluator != "live")
    assert JudgeCache(cache).stats().answers == 36

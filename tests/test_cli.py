"""The command line itself: fast, without torch, and files that fit each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlme.cli import main
from rlme.commands import read_config, recipe_files
from rlme.config import Config
from rlme.config_file import apply_overrides, parse_yaml, validate
from tests.tiny_runs import tiny_config


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


HEAVY = "[m for m in ('torch', 'transformers', 'trl', 'datasets', 'pandas', 'sklearn', 'pyarrow') if m in sys.modules]"


@pytest.mark.parametrize(
    "code",
    ["import rlme", "import rlme.config, rlme.questions, rlme.judging, rlme.judgement", "from rlme.cli import app"],
)
def test_importing_is_cheap(code: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print({HEAVY})"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_help_is_instant() -> None:
    command = [sys.executable, "-c", "from rlme.cli import main; main(['--help'])"]
    subprocess.run(command, capture_output=True, check=True)  # byte code and disk cache
    seconds = [1.0]
    while min(seconds) >= 0.5 and len(seconds) < 20:  # other tests run at the same time
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_every_public_name_exists() -> None:
    import rlme

    for name in rlme.__all__:
        assert getattr(rlme, name) is not None
    with pytest.raises(AttributeError):
        rlme.nothing  # noqa: B018


def test_init_writes_what_train_reads(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "my.yaml"
    run("init", str(path))
    assert "my.yaml" in capsys.readouterr().out
    assert read_config(str(path)).questions["brief"].weight == 0.5
    with pytest.raises(SystemExit) as ended:
        main(["init", str(path)])
    assert ended.value.code == 2
    run("init", str(tmp_path / "quick.yaml"), "--recipe", "quickstart")
    assert read_config(str(tmp_path / "quick.yaml")).lora is not None


def test_schema_describes_every_field(capsys: Any) -> None:
    run("schema")
    schema = json.loads(capsys.readouterr().out)
    missing = [
        f"{name}.{key}"
        for name, section in {**schema["$defs"], "Config": schema}.items()
        for key, field in section.get("properties", {}).items()
        if not field.get("description") and "$ref" not in field
    ]
    assert not missing


def test_recipes_are_listed_and_parse(tmp_path: Path, capsys: Any) -> None:
    run("recipes", "--json", str(tmp_path / "r.json"))
    listed = {row["recipe"] for row in json.loads((tmp_path / "r.json").read_text())}
    assert listed == set(recipe_files()) >= {"quickstart", "tone", "paper-gsm8k"}


def test_check_shows_all_defaults(capsys: Any) -> None:
    run("check", "quickstart", "--show")
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["train"]["loss"] == "cispo" and content["evaluators"][0]["model"] == "frozen"
    assert Config.model_validate(content)


def test_the_common_case_is_short(tmp_path: Path) -> None:
    """The example of the README."""
    text = """
model: Qwen/Qwen2.5-0.5B-Instruct
data: {train: prompts.jsonl, prompt: "{{ question }}", answer: answer}
questions:
  correct: Is the answer correct?
  brief: {ask: "Is the length of the solution between 200 and 500 characters?", weight: 0.5}
evaluators: [live]
train: {steps: 120, prompts_per_step: 16, group_size: 6}
"""
    config = validate(Config, parse_yaml(text, "x"), "x")
    assert config.evaluators[0].model == "live" and config.evaluator_weights() == [1.0]
    assert config.questions["brief"].weight == 0.5 and config.train.loss == "cispo"


def test_yaml_words_and_numbers_mean_what_people_write() -> None:
    content = parse_yaml("q: {ask: a, target: NO}\nx: 1e-4\ny: 2E+3", "x")
    assert content["x"] == 1e-4 and content["y"] == 2000.0
    config = tiny_config_with({"questions": {"q": content["q"]}})
    assert config.questions["q"].target == "NO"


def tiny_config_with(changes: dict[str, Any]) -> Config:
    base = {"model": "m", "data": "d.jsonl", "questions": {"q": "Is it?"}}
    return validate(Config, {**base, **changes}, "x")


def test_evaluator_weights_default_to_a_mean() -> None:
    config = tiny_config_with({"evaluators": ["live", "frozen", {"model": "other", "weight": 0}]})
    assert config.evaluator_weights() == [0.5, 0.5, 0]


def test_overrides_reach_everything(tmp_path: Path) -> None:
    content = tiny_config(tmp_path, tmp_path)
    apply_overrides(
        content,
        [
            "train.steps=9",
            "model.dtype=bfloat16",
            "evaluators.0=frozen",
            "questions.correct.weight=2",
            "lora.r=4",
            "reward.mode=rlvr",
        ],
    )
    config = validate(Config, content, "x")
    assert config.train.steps == 9 and config.model.dtype == "bfloat16" and config.evaluators[0].model == "frozen"
    assert config.questions["correct"].weight == 2 and config.questions["correct"].ask == "Is the answer correct?"
    assert config.lora is not None and config.lora.r == 4 and config.reward.mode == "rlvr"


def test_data_beside_the_configuration_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "conf" / "c.yaml").write_text('model: m\ndata: p.jsonl\nquestions: {q: "Is it?"}\n')
    monkeypatch.chdir(tmp_path)
    assert read_config("conf/c.yaml").data.train == str(Path("conf") / "p.jsonl")


def test_completions_cannot_move_the_cursor() -> None:
    from rlme.training.display import examples, plain

    assert plain("a\x1b[31mb\rc", 99) == "a\ufffd[31mb\ufffdc"
    row = {
        "prompt_index": 0,
        "prompt": "[bold]p",
        "completion": "[red]x[/red]\x1b[2J",
        "reward": 1.0,
        "correct": None,
        "judgements": [],
    }
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(examples([row], 1))
    text = console.export_text()
    assert "[red]x[/red]" in text and "\x1b[2J" not in text


def test_the_configuration_page_is_up_to_date() -> None:
    import runpy

    docs = Path(__file__).parents[1] / "docs"
    page = runpy.run_path(str(docs / "make_configuration.py"))["page"]()
    assert page == (docs / "configuration.md").read_text(), "run: python docs/make_configuration.py"

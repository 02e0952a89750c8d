"""The lab's shipped models and a run with them, from the command to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from rlme.cli import main
from rlme.config_file import read_yaml
from rlme.errors import InputError
from rlme.lab.build import PLANS
from rlme.lab.gates import GATES, measure, passes
from rlme.models import load_model, load_tokenizer

MODELS = Path(__file__).resolve().parents[1] / "src" / "rlme" / "lab" / "models"


def test_the_models_ship_small_with_a_card() -> None:
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) < 5e6
    card = (MODELS / "README.md").read_text()
    for name in PLANS:
        assert f"`builtin:{name}`" in card


def test_the_base_model_holds_its_gates() -> None:
    numbers = measure(load_model("builtin:lab"), load_tokenizer("builtin:lab"), prompts=100)
    assert passes(numbers), {k: numbers[k] for k in GATES}


def test_the_weak_evaluator_is_weak() -> None:
    shipped = json.loads((MODELS / "lab-weak" / "gates.json").read_text())
    assert 0.6 < shipped["auroc"] < 0.8


def test_an_unknown_lab_model_is_named() -> None:
    with pytest.raises(InputError, match="builtin:lab-weak"):
        load_model("builtin:lab-weka")


def test_from_the_command_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, docs = tmp_path / "runs", tmp_path / "docs"
    arguments = ["--out", str(out), "--docs", str(docs)]
    for _ in range(2):  # the second time everything is there already
        with pytest.raises(SystemExit) as ended:
            main(["lab", "fig2", "--seeds", "1", "--steps", "2", *arguments])
        assert ended.value.code == 0
        assert "| RLME |" in capsys.readouterr().out
        assert (out / "images" / "lab-fig2.svg").is_file()
    with pytest.raises(SystemExit):
        main(["lab", "fig2", "--arm", "RLME", "--seeds", "1", "--steps", "3", *arguments])
    assert "RLME-seed0: there already, with 2 steps instead of 3: delete it" in capsys.readouterr().out
    for experiment, arm in (("fig4", "live"), ("fig6", "RLVR")):  # the same runs as Figure 2's
        with pytest.raises(SystemExit):
            main(["lab", experiment, "--arm", arm, "--seeds", "1", "--steps", "2", *arguments])
        assert f": as {out / 'fig2'}" in capsys.readouterr().out
        copied = read_yaml(out / experiment / f"{arm}-seed0" / "config.yaml")
        assert copied["output"] == str(out / experiment / f"{arm}-seed0")
    with pytest.raises(SystemExit):
        main(["lab", "report", *arguments])
    page = (docs / "lab.md").read_text()
    assert "| RLME |" in page and "| RLVR |" in page
    assert (docs / "images" / "lab-fig2.svg").is_file()
    written = page.replace("<!-- remarks fig2 -->\n", "<!-- remarks fig2 -->\nSeen by a person.\n")
    (docs / "lab.md").write_text(written)
    with pytest.raises(SystemExit):
        main(["lab", "report", *arguments])
    assert "Seen by a person." in (docs / "lab.md").read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments in (["fig2", "--out"], ["build", "--out"], ["report", "--docs"]):
        with pytest.raises(SystemExit) as ended:
            main(["lab", *arguments, str(tmp_path / "file" / "x")])
        assert ended.value.code == 2
        assert "cannot be written" in (said := capsys.readouterr().err) and "Traceback" not in said


def test_the_command_builds_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlme.cli import main

    there: list[bool] = []
    monkeypatch.setattr("rlme.lab.build.build_models", lambda out, console: there.append((out / "lab").exists()))
    with pytest.raises(SystemExit):
        main(["lab", "build", "--out", str(tmp_path / "new")])
    assert there == [False]


def test_building_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlme.lab import build
    from rlme.lab.pretrain import Plan, Stage

    monkeypatch.setattr(build, "PLANS", {"lab-tiny": Plan(hidden=32, layers=2, stages=(Stage(3),), documents=4)})
    monkeypatch.setattr("rlme.lab.gates.LONGEST_COMPLETION", 8)
    build.build_models(tmp_path, Console(quiet=True))
    assert load_tokenizer(tmp_path / "lab-tiny").eos_token == "<eos>"
    assert load_model(tmp_path / "lab-tiny").config.hidden_size == 32
    assert 0 <= json.loads((tmp_path / "lab-tiny" / "gates.json").read_text())["auroc"] <= 1

"""Comparing runs, and the files that reports write."""

import json
import os
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rlme.config import Config
from rlme.errors import InputError
from rlme.report.cli import compare as compare_command
from rlme.report.cli import report as report_command
from rlme.report.compare import group_runs, measures, over_seeds, write_comparison
from rlme.report.run import read_run
from rlme.report.terminal import print_comparison
from rlme.result_files import check_writable
from tests.synthetic_run import write_run
from tests.test_report import embedded, metrics_of


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "collapse", steps=60, prompts=4)


def test_compare_bands_seeds_and_tables_differences(tmp_path: Path) -> None:
    folders = []
    for rate in (2e-6, 1e-6):
        for seed in range(2):
            path = tmp_path / f"{rate}-{seed}"
            folders.append(
                write_run(path, steps=10, prompts=2, eval_every=5, eval_prompts=4, seed=seed, learning_rate=rate)
            )
    arms, differing = group_runs([read_run(folder) for folder in folders])
    assert [arm.name for arm in arms] == ["train.learning_rate=2e-06", "train.learning_rate=1e-06"]
    assert [len(arm.runs) for arm in arms] == [2, 2]
    assert [key for key, _ in differing] == ["train.learning_rate"]
    line = over_seeds(arms[0], "reward", 0)
    assert line is not None and line.band is not None
    one, two = (run.series("reward")[1][0] for run in arms[0].runs)
    assert line.values[0] == pytest.approx((one + two) / 2)
    assert line.band[1][0] - line.values[0] == pytest.approx(abs(one - two) / 2**0.5)
    assert "held-out gold, best" in [measure.name for measure in measures(arms)]
    write_comparison(folders, tmp_path / "c.html", tmp_path / "c.json")
    table = embedded(tmp_path / "c.html")["tables"][0]
    assert table["head"] == ["", arms[0].name, arms[1].name, "difference"]
    assert "±" in table["rows"][1][1]
    assert json.loads((tmp_path / "c.json").read_text())["measures"]["steps"][arms[0].name] == [10.0, 10.0]


def test_seeds_made_by_another_version_are_seeds_still(tmp_path: Path) -> None:
    """A key that an older version did not know yet does not set a run apart."""
    dumped = Config.model_validate(
        {"model": "m", "data": {"train": "x.jsonl", "prompt": "q"}, "questions": {"q": "Right?"}}
    ).model_dump(mode="json")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "config.yaml").write_text(yaml.safe_dump(dumped))
        dumped["train"]["seed"] = 1
        dumped["train"].pop("on_alarm", None)
    arms, differing = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    assert [arm.name for arm in arms] == ["2 seeds"] and differing == []


def test_compare_prints_its_table_within_80_columns(run_folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"steps": 10, "prompts": 2, "eval_every": 5, "eval_prompts": 4, "learning_rate": 1e-6}
    others = [write_run(tmp_path / name, seed=seed, **sizes) for seed, name in enumerate(("other", "seed"))]
    console = Console(file=StringIO(), width=80)
    print_comparison(*write_comparison([run_folder, *others], tmp_path / "c.html"), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "B  train.steps=10, train.learning_rate=1e-06: other, seed" in text
    assert re.search(r"steps +60 +10 ± 0 +-50", text)
    assert "…" not in text


@pytest.mark.parametrize("width", [24, 80, 180])
def test_compare_cuts_no_number_of_many_configurations(tmp_path: Path, width: int) -> None:
    folders = [metrics_of(tmp_path / f"r{i}", {"step": 1, "reward": -0.123 * (i + 1)}) for i in range(9)]
    _, rows = arms_and_rows = write_comparison(folders, tmp_path / "c.html")
    console = Console(file=StringIO(), width=width)
    print_comparison(*arms_and_rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    printed = text.split()
    assert all(printed.count(cell) >= row.count(cell) for row in rows for cell in row[1:])
    assert text.count(" B - A") == 1 and (text.count("reward at the") == 1) == (width == 180)


def test_one_folder_named_twice_is_no_second_seed(run_folder: Path, tmp_path: Path) -> None:
    other = metrics_of(tmp_path / "other", {"step": 1, "reward": -0.5})
    arms, _ = write_comparison([run_folder, other, other / ".." / "other"], tmp_path / "c.html")
    assert [[run.name for run in arm.runs] for arm in arms] == [["collapse"], ["other"]]


def test_compare_counts_the_steps_that_were_done(run_folder: Path, tmp_path: Path) -> None:
    """A run may have ended early, or gone on for longer than its configuration says."""
    for name, planned in (("a", 400), ("b", 5)):
        (tmp_path / name).mkdir()
        config = yaml.safe_load((run_folder / "config.yaml").read_text())
        config["train"]["steps"] = planned
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 14, "reward": -1.0}\n{"step": 15, "reward": -0.5}\n')
    _, rows = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html")
    assert rows[0] == ["steps", "15", "15", "+0"]
    tables = {table["title"]: table for table in embedded(tmp_path / "c.html")["tables"]}
    assert [row[2] for row in tables["Runs"]["rows"]] == ["15", "15"]
    assert tables["Settings that differ"]["rows"] == [["train.steps", "400", "5"]]


@pytest.mark.parametrize("command", [report_command, compare_command])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.setattr("rlme.report.html.render", lambda *_: pytest.fail("this was the work"))
    runs = run_folder if command is report_command else [run_folder, run_folder]
    for output, table in (("/proc/x.html", None), (tmp_path / "page.html", tmp_path)):
        with pytest.raises(InputError, match="cannot be written"):
            command(runs, Path(output), table)
    assert not (tmp_path / "page.html").exists()


def test_files_are_tried_without_leaving_a_trace(tmp_path: Path) -> None:
    kept, link, pipe = tmp_path / "kept.json", tmp_path / "link.json", tmp_path / "pipe"
    kept.write_text("old")
    link.symlink_to(tmp_path / "target.json")
    os.mkfifo(pipe)
    check_writable(None, kept, link, pipe, tmp_path / "new" / "table.json")
    assert kept.read_text() == "old"
    assert link.is_symlink() and not link.exists()
    assert not any((tmp_path / "new").iterdir())


def test_files_that_would_overwrite_each_other_are_refused(run_folder: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    with pytest.raises(InputError, match="named for two results"):
        check_writable(same, tmp_path / "new" / ".." / "same")
    assert not any(tmp_path.iterdir())
    same.write_text("kept")
    (tmp_path / "link").symlink_to(same)
    with pytest.raises(InputError, match="a file this command reads"):
        check_writable(None, tmp_path / "link", inputs=[None, str(same)])
    check_writable(Path("/dev/null"), Path("/dev/null"))
    for table in (run_folder / "report.html", run_folder / "metrics.jsonl"):
        with pytest.raises(InputError, match="overwrit"):
            report_command(run_folder, None, table)
    with pytest.raises(InputError, match="a file this command reads"):
        compare_command([run_folder, run_folder], run_folder / "config.yaml", None)


def test_compare_wants_two_runs(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two or more"):
        write_comparison([run_folder], tmp_path / "c.html")
    write_comparison([run_folder, run_folder], tmp_path / "c.html")  # the same run twice is odd but no error


def test_long_settings_do_not_name_a_configuration(tmp_path: Path) -> None:
    for name, note in (("a", "x" * 200), ("b", "y")):
        metrics_of(tmp_path / name, {"step": 1})
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"evaluators": note}))
    arms, differing = group_runs([read_run(tmp_path / "a"), read_run(tmp_path / "b")])
    assert [arm.name for arm in arms] == ["a", "b"] and [key for key, _ in differing] == ["evaluators"]

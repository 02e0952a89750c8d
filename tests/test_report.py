"""Reports without a browser: reading whatever is in a run's folder, findings, samples, comparison, terminal."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from rlme.errors import InputError
from rlme.report.compare import write_comparison
from rlme.report.content import best_heldout, charts, duration, failures, findings, judges, spending, tiles
from rlme.report.html import embed
from rlme.report.page_data import page_data, write_report
from rlme.report.run import read_run
from rlme.report.samples import choose, marks
from rlme.report.terminal import plain, print_overview, sparkline, watch
from tests.synthetic_run import HOSTILE, write_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "collapse", steps=60, prompts=4)


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return dict(json.loads(found.group(1)))


def test_a_whole_run_is_read_and_judged(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.steps == 60
    assert run.missing == []
    assert judges(run)[0] == ("live", "correct")
    assert len(judges(run)) == 6
    levels = [finding.level for finding in findings(run)]
    assert levels[0] == "bad"  # the collapse
    assert {tile.label for tile in tiles(run)} >= {"steps", "reward", "gold, held-out", "failed judgements", "cost"}
    assert run.weight("qwen", "correct") == 0
    assert run.weight("live", "concise") == 0.25
    assert spending(run).seconds["sample"] > 0


def test_the_page_holds_every_curve_and_the_alarm(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder, tmp_path / "page.html")
    data = embedded(page)
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:4] == ["Reward", "Gold accuracy", "Question: correct", "Question: concise"]
    assert [mark["kind"] for mark in data["marks"]] == ["alarm", "best"]
    series = next(chart for chart in data["charts"] if chart["title"] == "Question: correct")["series"]
    assert [s["name"] for s in series if s["dashed"]] == ["qwen (weight 0)", "qwen (weight 0), held-out"]
    assert data["rule"] == "All 1,960 completions of the run are here."


def test_nothing_a_model_wrote_can_leave_the_data_block(run_folder: Path, tmp_path: Path) -> None:
    page = write_report(run_folder, tmp_path / "page.html").read_text()
    block = page[page.index('id="data">') :]
    block = block[: block.index("</script>")]
    assert not set("<>&\u2028\u2029") & set(block.removeprefix('id="data">'))
    texts = [row["text"] for group in embedded(tmp_path / "page.html")["groups"] for row in group["rows"]]
    for hostile in HOSTILE:
        assert any(text.startswith(hostile) for text in texts)
    assert "innerHTML" not in page


def test_embedding_is_lossless() -> None:
    data = {"a": "</script><!-- & \u2028 \x00 \u202e é 漢 😀 \\", "b": [1.5, None]}
    assert json.loads(embed(data)) == data


def test_large_runs_are_sampled_by_a_stated_rule(run_folder: Path) -> None:
    run = read_run(run_folder)
    few = choose(run, budget=300_000, steps=10)
    assert "evenly spaced" in few.rule
    steps = {group["step"] for group in few.groups if not group["heldout"]}
    assert {1, 60, run.alarms[0][0]} <= steps
    assert all(len(group["rows"]) == (1 if group["heldout"] else 6) for group in few.groups)
    assert any("failed" in row["marks"] for group in few.groups for row in group["rows"])
    assert len(embed({"groups": few.groups}).encode()) < 301_000
    assert choose(run, budget=300_000, steps=10) == few


def test_groups_are_ordered_by_reward_with_missing_last(run_folder: Path) -> None:
    for group in choose(read_run(run_folder)).groups:
        rewards = [row["reward"] for row in group["rows"]]
        known = [reward for reward in rewards if reward is not None]
        assert known == sorted(known, reverse=True)
        assert rewards[: len(known)] == known


def test_marks() -> None:
    def row(**changes: Any) -> dict[str, Any]:
        base = {"correct": None, "reward": -0.1, "truncated": False, "completion": "4", "judgements": []}
        return {**base, **changes}

    def judged(probability: float | None, question: str = "q") -> dict[str, Any]:
        return {"question": question, "probability": probability, "failure": None if probability else "timeout"}

    assert marks(row(), -0.1) == []
    assert marks(row(correct=False), -0.1) == ["wrong"]
    assert marks(row(correct=False), -0.05) == []
    assert marks(row(judgements=[judged(0.9), judged(0.3)]), None) == ["disagree"]
    assert marks(row(judgements=[judged(0.9), judged(0.3, "other")]), None) == []
    assert marks(row(judgements=[judged(None)], truncated=True), None) == ["failed", "clipped"]
    assert marks(row(completion="This is the correct answer."), None) == ["addresses"]


def test_without_gold_gold_is_absent_not_zero(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, prompts=2, eval_every=6, eval_prompts=4, gold=False)
    run = read_run(folder)
    assert not [key for key in run.keys if "gold" in key]
    assert "Gold accuracy" not in [chart.title for chart in charts(run)]
    assert not [tile for tile in tiles(run) if "gold" in tile.label]
    assert "Best checkpoint by question 'concise' by qwen" in " ".join(f.text for f in findings(run))
    assert all(row["correct"] is None for group in choose(run).groups for row in group["rows"])


def test_nothing_independent_of_the_reward_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": -1.0}\n{"step": 2, "reward": -0.9}\n')
    texts = [finding.text for finding in findings(read_run(folder))]
    assert any("Nothing independent of the reward is measured" in text for text in texts)


def test_a_starting_model_better_than_every_checkpoint_is_said(tmp_path: Path) -> None:
    values = {0: 0.9, 1: 0.5, 2: 0.6}
    lines = [{"step": step, "reward": -1.0, "eval/gold/accuracy": value} for step, value in values.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [finding.text for finding in findings(read_run(tmp_path))]
    assert any("Best checkpoint by gold accuracy on held-out prompts: step 2 (0.6)" in text for text in texts)
    assert "The starting model (0.9) is better by gold accuracy than every checkpoint." in texts


@pytest.mark.parametrize("content", ["empty", "no steps", "not a run", "a file"])
def test_folders_with_nothing_in_them(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "run"
    if content == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
    if content == "not a run":
        (folder / "notes.txt").write_text("hello")
    if content == "no steps":
        (folder / "config.yaml").write_text("model: {path: x}\nrun_info: {format: 1}\n")
    if content in ("no steps", "empty"):
        page = write_report(folder)
        texts = " ".join(finding["text"] for finding in embedded(page)["findings"])
        assert "No training step has been recorded yet" in texts
        assert ("There is no config.yaml" in texts) == (content == "empty")
        assert "There is no metrics.jsonl" in texts
        assert embedded(page)["charts"] == []
        print_overview(folder, Console(file=StringIO()))
        (folder / "config.yaml").write_text("train: {steps: 0}\n")
        assert any("zero steps" in text for text in read_run(folder).missing)
    else:
        with pytest.raises(InputError, match="run"):
            read_run(folder)


def test_a_run_cut_off_in_the_middle_is_shown_as_far_as_it_goes(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(run_folder, folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: int(len(text) * 0.7)])
    broken = folder / "rollouts" / "step-000007.parquet"
    broken.write_bytes(broken.read_bytes()[:500])
    (folder / "rollouts" / "step-000008.partial").write_bytes(b"x")
    data = page_data(read_run(folder))
    said = " ".join(finding["text"] for finding in data["findings"])
    assert "The last line of metrics.jsonl is cut off" in said
    assert "rollouts/step-000007.parquet cannot be read" in said
    assert 30 < data["last_step"] < 60
    assert 7 not in {group["step"] for group in data["groups"] if not group["heldout"]}


def test_rollouts_of_another_version_are_shown_as_far_as_they_go(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    old = pq.read_table(next(iter(read_run(run_folder).rollout_files().values())))
    lean = old.drop_columns(["anchored", "advantage", "tokens", "truncated"]).append_column("new", old["step"])
    pq.write_table(lean, tmp_path / "rollouts" / "step-000001.parquet")
    pq.write_table(old.drop_columns(["completion"]), tmp_path / "rollouts" / "step-000002.parquet")
    chosen = choose(read_run(tmp_path))
    assert {group["step"] for group in chosen.groups} == {1}
    assert chosen.groups[0]["rows"][0]["tokens"] is None
    assert chosen.missing == ["rollouts/step-000002.parquet cannot be read (KeyError)."]


@pytest.mark.parametrize("version, said", [(1, False), (2, True)])
def test_a_newer_format_is_said(run_folder: Path, tmp_path: Path, version: int, said: bool) -> None:
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["run_info"]["format"] = version
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.jsonl").write_text((run_folder / "metrics.jsonl").read_text())
    run = read_run(tmp_path)
    assert any("has format 2" in text for text in run.missing) == said
    assert any("no rollouts/" in text for text in run.missing)


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "null",
        '{"reward": 1}',
        '{"step": "x"}',
        "{",
        '{"step": true}',
        '{"step": ' + "9" * 400 + "}",
        "9" * 5000,
        "[" * 200_000,
    ],
)
def test_lines_that_are_no_records_are_left_out_and_said(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "reward": -1.0}}\n{line}\n{{"step": 2, "reward": -0.5}}\n')
    run = read_run(tmp_path)
    assert run.steps == 2
    assert any("metrics.jsonl" in text and "left out" in text for text in run.missing)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "", "run_info: 3\nquestions: 5\nevaluators: {}\n"])
def test_odd_configurations_do_not_stop_the_page(run_folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "metrics.jsonl").write_text((run_folder / "metrics.jsonl").read_text())
    assert page_data(read_run(tmp_path))["charts"]


def metrics_of(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_judged_part_of_a_reward_is_shown_where_it_is(tmp_path: Path) -> None:
    records = [{"step": s, "reward": 0.0, "reward/judged": s / 10, "eval/reward/judged": 0.5} for s in (1, 2)]
    folder = metrics_of(tmp_path / "run", *records)
    reward = charts(read_run(folder))[0]
    assert [series.name for series in reward.series] == ["training batch", "judged part", "judged part, held-out"]
    assert [(tile.label, tile.value) for tile in tiles(read_run(folder))][2] == ("reward, judged part", "0.2")
    plain_run = metrics_of(tmp_path / "plain", {"step": 1, "reward": -0.5})
    _, rows = write_comparison([plain_run, folder], tmp_path / "c.html")
    assert ["judged part of the reward at the end", "", "0.2", ""] in rows
    assert "Judged part of the reward, training batch" in [c["title"] for c in embedded(tmp_path / "c.html")["charts"]]


@pytest.mark.parametrize(
    "odd",
    [
        {"judge/x/y/failures/timeout": "many", "judge/x/y/mass": "low"},
        {"reward": int("9" * 400), "time/step": True},
        {"reward": 1e308, "cost/step": -1e308, "alarm": 5},
        {"reward": float("nan"), "completions/mean_tokens": [1]},
    ],
)
def test_values_that_are_no_usable_numbers_are_left_out(tmp_path: Path, odd: dict[str, Any]) -> None:
    records = [{"step": 1, "reward": -1.0}, {"step": 2, **odd}, {"step": 3, "reward": -1e308}, {"step": 4}]
    folder = metrics_of(tmp_path / "run", *records)
    run = read_run(folder)
    assert run.series("reward") == ([1], [-1.0]) and run.steps == 4 and run.alarms == []
    write_report(folder, tmp_path / "page.html")
    print_overview(folder, Console(file=StringIO()))
    write_comparison([folder, metrics_of(tmp_path / "other", *records)], tmp_path / "c.html")


def test_names_with_slashes_and_a_question_called_failures(tmp_path: Path) -> None:
    record = {
        "step": 1,
        "reward": -1.0,
        "judge/org/model/failures/probability": 0.5,
        "judge/org/model/failures/failures/timeout": 2,
        "judge/org/model/right/failures/refused": 1,
        "eval/judge/org/model/right/probability": 0.5,
        "judge/agreement": 1.0,
        "question/right/score": -1.0,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run = read_run(tmp_path)
    assert judges(run) == [("org/model", "failures"), ("org/model", "right")]
    assert failures(run)[0] == {"timeout": 2, "refused": 1}
    assert "Question: right" in [chart.title for chart in charts(run)]


def test_the_terminal_says_what_the_page_says(run_folder: Path) -> None:
    run = read_run(run_folder)
    console = Console(file=StringIO(), width=200)
    print_overview(run_folder, console)
    text = re.sub(r"\s+", " ", console.file.getvalue())  # type: ignore[attr-defined]
    for finding in findings(run):
        assert finding.text in text
    for chart in charts(run):
        if not chart.minor:
            assert chart.title in text
    once = Console(file=StringIO(), width=200)
    watch(run_folder, every=1, once=True, console=once)
    assert once.file.getvalue() == console.file.getvalue()  # type: ignore[attr-defined]


def test_watch_shows_a_run_again_when_it_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "reward": -1.0}\n')
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            with open(metrics, "a") as file:
                file.write('{"step": 2, "reward": -0.5}\n{"step": 3, "rew')  # a line being written
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("rlme.report.terminal.time.sleep", sleep)
    console = Console(file=StringIO(), width=160, height=60, force_terminal=True, legacy_windows=False)
    watch(tmp_path, every=0.5, once=False, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert looks == [0.5] * 4
    assert text.count("step 1, Ctrl-C ends the view") == 1
    assert text.count("step 2, Ctrl-C ends the view") == 1
    assert "The last line of metrics.jsonl is cut off" in text


def test_a_small_screen_says_what_it_leaves_out_and_no_number_is_cut(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=StringIO(), width=80)
    print_overview(run_folder, console)
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("config.yaml", "metrics.jsonl"):
        text = (run_folder / name).read_text().replace("steps: 60", "steps: 61")
        (tmp_path / name).write_text(text)

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlme.report.terminal.time.sleep", sleep)
    small = Console(file=StringIO(), width=80, height=24, force_terminal=True, legacy_windows=False)
    watch(tmp_path, every=0.5, once=False, console=small)
    assert re.search(r"\d+ more lines in a taller terminal", small.file.getvalue())  # type: ignore[attr-defined]
    monkeypatch.setattr("rlme.report.terminal.time.sleep", lambda seconds: pytest.fail("the run is over"))
    watch(run_folder, every=0.5, once=False, console=small)


def test_a_run_cannot_drive_the_terminal(tmp_path: Path) -> None:
    record = {
        "step": 1,
        "reward": -1.0,
        "alarm": "\x1b[2Jgone [red]markup[/red] [/] \u202e",
        "judge/\x1b]0;x\x07/q/mass": 0.1,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    console = Console(file=StringIO(), width=200, force_terminal=False)
    print_overview(tmp_path, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]markup[/red]" in text
    assert plain("a\x1bb\n") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


def test_small_formats() -> None:
    assert [duration(s) for s in (4.2, 200, 3900)] == ["4.2 s", "3 min 20 s", "1 h 05 min"]
    from rlme.report.content import Series

    assert sparkline(Series("x", [1, 2, 3, 4], [0, 1, 2, 3]), 4) == "▁▃▆█"
    assert sparkline(Series("x", [5], [1.0]), 3) == "▁▁▁"


def test_samples_read_what_training_writes(run_folder: Path) -> None:
    path = next(iter(read_run(run_folder).rollout_files().values()))
    assert pq.read_schema(path).names[:3] == ["step", "prompt_index", "sample"]


def test_the_cost_has_the_held_out_prompts_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, prompts=2, eval_every=2, eval_prompts=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"cost/step": 1.0, "endpoint/judge/cost": 1.5, "endpoint/other/cost": 0.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spending(read_run(folder)).cost == pytest.approx(1.75 * len(lines))


def test_of_the_starting_model_there_is_no_best_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, prompts=2, eval_every=10, eval_prompts=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line if line["step"] == 0 else {k: v for k, v in line.items() if "eval/" not in k} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    run = read_run(folder)
    assert not any("Best checkpoint" in finding.text for finding in findings(run))
    assert any("held-out" in tile.label for tile in tiles(run))


def test_a_judgement_of_a_negative_question_chooses_no_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, prompts=2, eval_every=6, eval_prompts=4, gold=False)
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["questions"]["concise"]["weight"] = -0.5
    file.write_text(yaml.safe_dump(content))
    best = best_heldout(read_run(folder))
    assert best is not None and best[0] == "judge/qwen/correct/probability"

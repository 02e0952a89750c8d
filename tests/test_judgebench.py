"""The judge benchmark: reading labelled items, asking, metrics, recorded verdicts, reports, the command."""

import json
import math
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import typer
from filelock import FileLock
from rich.console import Console
from sklearn.metrics import brier_score_loss, roc_auc_score
from typer.testing import CliRunner

from rlme.align.judge import PairwiseJudge
from rlme.align.protocols import PROTOCOLS
from rlme.errors import InputError, RunStopped
from rlme.judgebench import metrics as m
from rlme.judgebench.analysis import analyse, summary
from rlme.judgebench.cli import _show, judge_bench
from rlme.judgebench.items import BenchSet, PairItem, load_set
from rlme.judgebench.report import markdown, page
from rlme.judgebench.run import Record, Run, judge_pairs, judge_points, load_recorded, save_records
from rlme.judging import Judging
from rlme.questions import Question
from tests.fake_judge import FakeJudge

app = typer.Typer()
app.command()(judge_bench)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i: int, label: object = 1, **more: object) -> dict:
    good, bad = f"right {i} .", f"wrong number {i} and more words ." if i % 4 < 2 else "no ."
    first, second = (good, bad) if label in (1, "1", "a", "model_a") else (bad, good)
    return {"instruction": f"Question {i}?", "output_1": first, "output_2": second, "label": label, **more}


def bench_set(n: int = 12) -> BenchSet:
    items = [pair(i, 1 + i % 2) for i in range(n)]
    return BenchSet(
        "toy",
        tuple(
            PairItem(r["instruction"], r["output_1"], r["output_2"], r["label"], (f"right {i} .",), r["instruction"])
            for i, r in enumerate(items)
        ),
    )


def run_judge(evaluator: FakeJudge, protocol: str = "refeval", shown: str = "given", **options) -> Run:
    judge = PairwiseJudge([evaluator], PROTOCOLS[protocol], **options)
    return judge_pairs(bench_set(), judge, name=evaluator.name, shown=shown, advance=lambda n: None)


# reading


@pytest.mark.parametrize("first, second", [(1, 2), ("1", "2"), ("a", "b"), ("model_a", "model_b")])
def test_label_spellings(tmp_path, first, second):
    source = write_rows(tmp_path / "x.jsonl", [pair(0, first), pair(1, second)])
    assert [item.label for item in load_set(source).items] == [1, 2]


def test_labels_given(tmp_path):
    source = write_rows(tmp_path / "x.jsonl", [pair(0, 0), pair(1, 1)])
    assert [item.label for item in load_set(source, labels=["0", "1"]).items] == [1, 2]


@pytest.mark.parametrize(
    "labels, message",
    [
        ([1, "2"], "mixes label spellings"),
        (["a", "B"], "mixes label spellings"),
        (["good", "bad"], "does not say output 1 or 2"),
        ([1, None], "row 2: the column 'label' is missing"),
        (["tie", "tie"], "every row is a tie"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    source = write_rows(tmp_path / "x.jsonl", [pair(i, label) for i, label in enumerate(labels)])
    with pytest.raises(InputError, match=message):
        load_set(source)


def test_columns_are_mapped_and_missing_ones_named(tmp_path):
    rows = [{"task": "t", "output_1": "a", "output_2": "b", "label": 1}]
    source = write_rows(tmp_path / "x.jsonl", rows)
    assert load_set(source, columns={"instruction": "task"}).items[0].instruction == "t"
    with pytest.raises(InputError, match=r"no column 'instruction'.*--column instruction=COLUMN"):
        load_set(source)
    with pytest.raises(InputError, match="no column 'tusk' for 'instruction'"):
        load_set(source, columns={"instruction": "tusk"})
    with pytest.raises(InputError, match=r"'instructon' is no field .*did you mean 'instruction'"):
        load_set(source, columns={"instructon": "task"})
    with pytest.raises(InputError, match=r"unknown benchmark set format 'pear' \(did you mean 'pairs'\?\)"):
        load_set(source, reader="pear")


def test_empty_output_is_named_by_row(tmp_path):
    source = write_rows(tmp_path / "x.jsonl", [pair(0), pair(1) | {"output_2": " "}])
    with pytest.raises(InputError, match="row 2: the column 'output_2' is ' ', expected a text"):
        load_set(source)


def test_points_keep_the_label_from_the_questions(tmp_path):
    rows = [{"question": "1+1?", "solution": "2", "is_correct": True, "source": "x", "reference": "A: 2"}]
    item = load_set(write_rows(tmp_path / "x.jsonl", rows), reader="gsm8k").items[0]
    assert item.label is True
    assert item.columns["reference"] == "A: 2" and "is_correct" not in item.columns


def test_mtbench_human_judgements(tmp_path):
    def talk(*answers: str) -> list[dict]:
        return [m for a in answers for m in ({"role": "user", "content": "ask"}, {"role": "assistant", "content": a})]

    rows = [
        {"conversation_a": talk("x", "y"), "conversation_b": talk("u", "v"), "turn": 2, "winner": "model_b"},
        {"conversation_a": talk("x"), "conversation_b": talk("u"), "turn": 1, "winner": "tie"},
    ]
    found = load_set(write_rows(tmp_path / "x.jsonl", rows), reader="mtbench")
    assert found.skipped == 1
    assert (found.items[0].output_1, found.items[0].output_2, found.items[0].label) == ("y", "v", 2)
    assert found.items[0].instruction == "ask\n\nask"


# metrics


def test_metrics_equal_scikit_learn_under_weights():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 60).astype(float), rng.random(60).round(1)
    weights = m.bootstrap_weights([str(i // 3) for i in range(60)], 20, seed=1)
    assert weights.shape == (21, 60)
    assert (weights[1:].sum(1) == 60).all()
    assert all((row.reshape(20, 3) == row.reshape(20, 3)[:, :1]).all() for row in weights)  # clusters stay together
    auroc, brier = m.auroc(p, y, weights), m.brier(p, y, weights)
    for r, row in enumerate(weights):
        repeated = np.repeat(np.arange(60), row.astype(int))
        assert auroc[r] == pytest.approx(roc_auc_score(y[repeated], p[repeated]))
        assert brier[r] == pytest.approx(brier_score_loss(y[repeated], p[repeated]))


def test_ece_by_hand():
    p, y = np.array([0.91, 0.93, 0.12, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    # bin 9: mean p 0.94667, share 2/3; bin 1: p 0.12, share 0
    expected = (3 * abs(2 / 3 - (0.91 + 0.93 + 1.0) / 3) + 0.12) / 4
    assert m.ece(p, y, np.ones((1, 4)))[0] == pytest.approx(expected)


def test_within_cluster_auroc_ignores_differences_between_prompts():
    p = np.array([0.9, 0.8, 0.2, 0.1])
    y = np.array([1.0, 0.0, 1.0, 0.0])
    assert m.within_cluster_auroc(p, y, ["a", "a", "b", "b"], np.ones((1, 4)))[0] == 1.0
    assert m.auroc(p, y, np.ones((1, 4)))[0] == 0.75


def test_length_bias_is_zero_for_a_perfect_judge_and_half_for_one_that_looks_at_length_only():
    y, longer = np.array([1.0, 1, 0, 0, 1, 0]), np.array([1, 2, 1, 2, 1, 1])
    weights = np.ones((1, 6))
    assert m.pair_length_bias(y, y, longer, weights)[0] == pytest.approx(0)
    assert m.pair_length_bias((longer == 1).astype(float), y, longer, weights)[0] == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    labels, length = rng.integers(0, 2, 40).astype(float), rng.random(40)
    assert m.point_length_bias(length * 0.3 + labels, labels, length, np.ones((1, 40)))[0] == pytest.approx(1)


def test_paired_tests():
    assert m.mcnemar(np.array([1, 1, 1, 0.0]), np.array([0, 0, 1, 1.0])) == (2, 1, pytest.approx(1.0))
    assert m.bootstrap_p(np.array([0.5] + [0.4] * 999)) == pytest.approx(0.002)
    assert m.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(m.kappa([1, 1], [1, 1]))


# asking


def test_a_perfect_judge():
    found = summary(run_judge(FakeJudge()), resamples=50)["metrics"]
    for name in ("accuracy", "accuracy_given", "accuracy_swapped", "accuracy_both", "accuracy_soft", "equal", "auroc"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}, name
    assert found["first_shown"]["value"] == 0.5
    assert found["length_bias"]["value"] == pytest.approx(0)


def test_a_judge_that_always_takes_the_first():
    found = summary(run_judge(FakeJudge(lambda o, i, r: 0.0, bias=2.0)), resamples=50)["metrics"]
    assert found["accuracy"]["value"] == 0.5
    assert found["accuracy_both"]["value"] == found["equal"]["value"] == 0
    assert found["first_shown"]["value"] == found["always_first"]["value"] == 1
    assert found["always_second"]["value"] == 0


def test_a_judge_that_likes_length():
    found = summary(run_judge(FakeJudge(lambda o, i, r: len(o)), "base"), resamples=50)["metrics"]
    assert found["accuracy"]["value"] == 0.5
    assert found["length_bias"]["value"] == 0.5


def test_failures_are_counted_and_leave_the_accuracy():
    found = summary(run_judge(FakeJudge(fail_on="Question 3?")), resamples=10)
    assert (found["items"], found["judged"], found["failures"]) == (12, 11, {"timeout": 2})
    assert found["metrics"]["accuracy"]["value"] == 1


def test_everything_failed():
    found = analyse([run_judge(FakeJudge(fail_on="Question"))], resamples=10)
    assert "metrics" not in found["runs"][0]
    assert "24 timeout" in markdown(found)


def test_items_without_a_reference_are_not_asked_and_counted():
    bench = bench_set()
    items = (PairItem("Q?", "a", "b", 1), *bench.items)
    judge = PairwiseJudge([FakeJudge()], PROTOCOLS["refeval"])
    run = judge_pairs(BenchSet("toy", items), judge, name="fake", advance=lambda n: None)
    assert run.unasked == 1 and len(run.records) == 12 and run.records[0].item == 1


def test_manipulation_tells_a_judge_that_reads_the_reference_from_one_that_does_not():
    reads, ignores = FakeJudge(name="reads"), FakeJudge(lambda o, i, r: float("right" in o), name="ignores")
    runs = [run_judge(e, shown=s) for e in (reads, ignores) for s in ("given", "worse", "other")]
    checks = {(c["judge"], c["reference"]): c["metrics"] for c in analyse(runs, resamples=50)["manipulation"]}
    assert checks["reads", "worse"]["moved"]["value"] == 1
    assert checks["reads", "worse"]["moved_to_worse"]["value"] == 1
    assert checks["reads", "worse"]["accuracy_after"]["value"] == 0
    assert checks["reads", "worse"]["shift"]["value"] < -0.5
    assert checks["ignores", "worse"]["shift"]["value"] == 0
    assert checks["ignores", "worse"]["moved"]["value"] == 0
    assert checks["ignores", "worse"]["moved_to_worse"]["value"] is None
    assert checks["ignores", "other"]["accuracy_after"]["value"] == 1


def test_exchanged_references_are_other_items_and_fixed_by_the_seed():
    evaluator = FakeJudge()
    run_judge(evaluator, shown="other")
    again = FakeJudge()
    run_judge(again, shown="other")
    assert [r.context for r in evaluator.requests] == [r.context for r in again.requests]
    for request in evaluator.requests:
        prompt = request.context[0]["content"]
        number = prompt.split("# Instruction\nQuestion ")[1].split("?")[0]
        assert f"# Reference output\nright {number} ." not in prompt


def test_paired_tests_and_agreement_between_judges():
    good, bad = FakeJudge(name="good"), FakeJudge(lambda o, i, r: -float("right" in o), name="wrong")
    found = analyse([run_judge(good), run_judge(bad), run_judge(good, "base")], resamples=50)
    tests = {(t["a"]["judge"], t["a"]["protocol"], t["b"]["judge"], t["b"]["protocol"]): t for t in found["tests"]}
    assert set(tests) == {("good", "refeval", "wrong", "refeval"), ("good", "refeval", "good", "base")}
    test = tests["good", "refeval", "wrong", "refeval"]
    assert test["difference"]["value"] == -1
    assert (test["only_a_right"], test["only_b_right"]) == (12, 0)
    assert test["p_mcnemar"] == pytest.approx(2 / 2**12)
    assert found["agreement"][0]["agreement"] == 0
    assert found["agreement"][0]["kappa"] == -1


def test_sets_are_also_taken_together():
    def run_on(name: str, protocol: str, right: int) -> Run:
        p = [0.9] * right + [0.1] * (4 - right)
        records = tuple(Record(i, f"c{i}", True, (1, 1), x, x) for i, x in enumerate(p))
        return Run(name, "j", protocol, records, pairwise=True)

    runs = [run_on(name, protocol, k) for name, protocol, k in (("a", "x", 1), ("b", "x", 4), ("a", "y", 2))]
    result = analyse(runs, resamples=10)
    together = {r["protocol"]: r for r in result["runs"] if r["set"] == "all pairs"}
    assert together["x"]["items"] == 8 and together["x"]["metrics"]["accuracy_soft"]["value"] == 5 / 8
    (test,) = (t for t in result["tests"] if t["set"] == "all pairs")
    assert test["items"] == 4 and test["difference"]["value"] == 0.25  # only the items that both were asked
    assert "| j | x | 25.0" in markdown(result)
    # Two measures of accuracy in one row: each is named.
    assert "difference: B minus A, mean of both orders; only A or B right: averaged probability" in markdown(result)
    assert len(analyse(runs[::2], resamples=10)["runs"]) == 2  # one set needs no such row


def test_single_answers(tmp_path):
    rows = [{"prompt": f"Is {i} even?", "answer": "yes" if i % 3 else "no", "label": i % 2 == 0} for i in range(12)]
    bench = load_set(write_rows(tmp_path / "x.jsonl", rows), reader="points")

    class YesMan(FakeJudge):
        def spellings(self, candidates):
            return tuple(candidates)

        def _one(self, request):
            from rlme.judgement import Answer

            return Answer(tuple(-0.1 if c.strip().lower() == "yes" else -5.0 for c in request.continuations))

    run = judge_points(bench, YesMan(), Question("Is it right?"), Judging(), advance=lambda n: None)
    found = summary(run, resamples=20)
    assert found["kind"] == "answers" and found["judged"] == 12
    assert found["metrics"]["says_right"]["value"] == 1
    assert found["metrics"]["accuracy"]["value"] == 0.5
    assert found["metrics"]["auroc"]["value"] == 0.5


# recorded verdicts


@pytest.mark.parametrize("name", ["natural", "neighbor", "gptinst"])
def test_the_published_llmbar_statistics_to_the_last_digit(shared_data, name, tmp_path):
    folder = shared_data / "llmbar"
    published = json.loads((folder / f"{name}.gpt4_statistics.json").read_text())
    target = tmp_path / "out.json"
    arguments = ["--verdicts", str(folder / f"{name}.jsonl"), "--json", str(target), "--resamples", "20"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (run,) = json.loads(target.read_text())["runs"]
    assert run["judge"] == "gpt4"
    assert run["llmbar"] == published
    # Ours agree where the definitions do, and show the kappa that the name promises.
    assert run["metrics"]["accuracy"]["value"] == pytest.approx(float(published["correct_average"][:-1]) / 100)
    assert run["kappa"]["orders"] == pytest.approx(published["kappa_agreement"])
    assert run["kappa"]["given"] > 0.7 > published["kappa_False"]


def test_recorded_verdicts_missing_and_malformed(tmp_path):
    rows = [pair(i, 1 + i % 2, x_verdicts={"False": "1", "True": 2 if i else None}) for i in range(4)]
    (run,) = load_recorded(write_rows(tmp_path / "x.jsonl", rows))
    assert run.judge == "x" and not run.soft
    found = summary(run, resamples=10)
    assert found["judged"] == 3 and found["failures"] == {"malformed": 1}
    assert found["llmbar"]["correct_False"] == "2 / 4 = 50.0%"
    assert "auroc" not in found["metrics"]
    rows[1]["x_verdicts"]["True"] = "both"
    with pytest.raises(InputError, match="row 2: 'x_verdicts' has the verdict 'both'; expected 1, 2 or null"):
        load_recorded(write_rows(tmp_path / "y.jsonl", rows))
    with pytest.raises(InputError, match="no recorded verdicts"):
        load_recorded(write_rows(tmp_path / "z.jsonl", [pair(0)]))


def test_saved_verdicts_score_as_when_they_were_made(tmp_path):
    runs = [run_judge(FakeJudge(fail_on="Question 2?")), run_judge(FakeJudge(), shown="worse")]
    save_records(runs, tmp_path / "verdicts.jsonl")
    assert load_recorded(str(tmp_path / "verdicts.jsonl")) == runs
    (tmp_path / "bad.jsonl").write_text('{"run": {"no": 1}}\n')
    with pytest.raises(InputError, match="not a verdicts file of this version"):
        load_recorded(str(tmp_path / "bad.jsonl"))


def test_an_interrupted_run_continues_where_it_was(monkeypatch, tmp_path):
    from rlme.evaluators import build as evaluators
    from rlme.judgebench import run as run_module

    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(6)])
    monkeypatch.setattr(run_module, "CHUNK", 2)

    class Killed(Exception):
        pass

    class Dying(FakeJudge):
        def logprobs(self, requests):
            if len(self.requests) >= 4:
                raise Killed
            return super().logprobs(requests)

    def command(evaluator: FakeJudge, name: str):
        monkeypatch.setattr(evaluators, "build_evaluators", lambda *a, **k: [evaluator])
        arguments = ["--judge", "x", "--data", source, "--resamples", "10", "-o", str(tmp_path / name)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    for _ in range(2):
        with pytest.raises(Killed):
            command(Dying(), "killed")
        (unfinished,) = (tmp_path / "killed").glob("unfinished*")
        with unfinished.open("a") as file:
            file.write('{"item": 2, "clus')  # cut off by the kill, and nothing may be written after it
    again = FakeJudge()
    command(again, "killed")
    assert len(again.requests) == 4  # only the last of three chunks
    command(FakeJudge(), "whole")
    assert not list((tmp_path / "killed").glob("unfinished*"))
    killed, whole = (load_recorded(str(tmp_path / name / "verdicts.jsonl"))[0].records for name in ("killed", "whole"))
    assert [(r.item, r.given, r.swapped) for r in killed] == [(r.item, r.given, r.swapped) for r in whole]


# reports and the command


def test_reports_are_self_contained_and_escape_what_they_show():
    record = Record(0, "c", True, (3, 4), 0.7, 0.6, mass=0.9)
    run = Run("<script>x</script>", "a|b", "base", (record,), pairwise=True)
    result = analyse([run], resamples=10)
    assert json.loads(json.dumps(result, allow_nan=False))
    html = page(result)
    assert "<script" not in html and "http" not in html and "<svg" in html and "&lt;script&gt;" in html
    text = markdown(result)
    assert "a\\|b" in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_of_any_width_shows_every_word(width):
    records = tuple(Record(i, str(i), bool(i % 2), (3, 4), 0.7, 0.2, mass=0.9) for i in range(6))
    result = analyse(
        [Run("pairs", "a-judge-with-a-name[/]", name, records, pairwise=True) for name in "ab"], resamples=10
    )
    console = Console(file=StringIO(), width=width)
    _show(result, console)
    text = " ".join(console.file.getvalue().split())
    assert "…" not in text and "a-judge-with-a-name[/]" in text
    assert ("accuracy (mean of both orders) 50.0" in text) == (width == 80)


def test_the_command_with_a_model(tmp_path, tiny_policy_dir):
    pairs = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2, reference=f"right {i} .") for i in range(4)])
    rows = [{"question": f"{i}?", "solution": "4", "is_correct": bool(i % 2), "reference": "4"} for i in range(4)]
    points = write_rows(tmp_path / "points.jsonl", rows)
    out = tmp_path / "out"
    arguments = ["--judge", str(tiny_policy_dir), "--data", f"llmbar:{pairs}", "--data", f"gsm8k:{points}"]
    arguments += ["--protocol", "base", "--protocol", "refeval", "--question", "Is it like {{ reference }}?"]
    arguments += ["--resamples", "10", "-o", str(out), "--json", str(tmp_path / "all.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # 4 pairs x 2 orders x (base, refeval, two wrong references), and 4 answers
    assert "5 runs, 36 judge calls" in result.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert [r["judged"] for r in found["runs"]] == [4, 4, 4]
    assert all(0 < r["mass"] <= 1 for r in found["runs"])
    assert len(found["manipulation"]) == 2
    for name in ("report.md", "report.html", "results.json", "verdicts.jsonl"):
        assert (out / name).stat().st_size
    saved, same = str(out / "verdicts.jsonl"), tmp_path / "again.json"
    again = ["--verdicts", saved, "--resamples", "10", "--json", str(same)]
    assert CliRunner().invoke(app, again, catch_exceptions=False).exit_code == 0
    assert json.loads(same.read_text()) == found
    more = CliRunner().invoke(app, [*arguments, "--protocol", "href", "--no-wrong-references"], catch_exceptions=False)
    assert "1 runs, 8 judge calls (3 runs are there already)" in more.output
    assert len(load_recorded(saved)) == 6


@pytest.mark.parametrize("model", ["x", None])
def test_the_folder_of_another_command_is_not_written_to(tmp_path, model):
    source = write_rows(tmp_path / "toy.jsonl", [pair(0, x_verdicts={"False": "1", "True": "1"})])
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    asked = ["--judge", model, "--data", source] if model else ["--verdicts", source]
    for folder, message in (
        (tmp_path, "holds a run of rlme train or rlme align: choose another"),
        (Path(source), "which cannot be made: File exists"),
        (Path(source) / "x", "which cannot be made: Not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, [*asked, "-o", str(folder)], catch_exceptions=False)
    with pytest.raises(InputError, match="cannot be written"):  # tried before anything is judged
        CliRunner().invoke(app, [*asked, "--json", str(Path(source) / "x.json")], catch_exceptions=False)
    assert {p.name for p in tmp_path.iterdir()} == {"toy.jsonl", "config.yaml"}


@pytest.mark.parametrize("kept", [True, False])
def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, kept):
    from rlme.evaluators import build as evaluators

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluators, "build_evaluators", interrupted)
    source = write_rows(tmp_path / "toy.jsonl", [pair(0)])
    folder = ["-o", str(tmp_path / "out")] if kept else []
    with pytest.raises(RunStopped, match="the same command goes on with what is in" if kept else "nothing is kept"):
        CliRunner().invoke(app, ["--judge", "x", "--data", source, *folder], catch_exceptions=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "judges` is empty"),
        (["--judge", "x"], "sets` is empty"),
        (["--judge", "x", "--data", "pears:FILE"], "unknown benchmark set format 'pears'"),
        (["--judge", "x", "--data", "FILE", "--protocol", "rafeval"], "unknown judging protocol 'rafeval'"),
        (["--judge", "x", "--data", "points:POINTS"], "give at least one question"),
        (["--judge", "x", "--data", "FILE", "--protocol", "refeval"], "no item of toy has a reference, so refeval"),
        (["--judge", "x", "--data", "FILE", "--column", "label"], "expected FIELD=COLUMN"),
        (["--verdicts", "FILE", "--judge", "x"], "leave out judges"),
    ],
)
def test_what_the_command_refuses_before_a_model_is_loaded(tmp_path, arguments, message):
    files = {
        "FILE": write_rows(tmp_path / "toy.jsonl", [pair(0)]),
        "POINTS": write_rows(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "a", "label": True}]),
    }
    for name, path in files.items():
        arguments = [a.replace(name, path) for a in arguments]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


# what a folder keeps


def with_judge(monkeypatch, evaluator: FakeJudge, settings: dict, out: Path):
    from rlme.evaluators import build as evaluators

    monkeypatch.setattr(evaluators, "build_evaluators", lambda *a, **k: [evaluator])
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"resamples": 10, **settings}))
    return CliRunner().invoke(app, [str(config), "-o", str(out)], catch_exceptions=False)


def test_other_weights_or_another_context_are_asked_again(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(4)])
    weights = tmp_path / "judge" / "model.safetensors"
    weights.parent.mkdir()
    settings: dict = {"judges": [str(weights.parent)], "sets": [source]}
    for content, judging, asked in (
        ("old", {}, 8),
        ("old", {"cache": "x.sqlite", "cache_mb": 2, "mass_warning": 0.95}, 0),
        ("newer", {}, 8),
        ("newer", {"max_context_tokens": 99}, 8),
    ):
        if not weights.exists() or weights.read_text() != content:
            weights.write_text(content)
        judge = FakeJudge()
        with_judge(monkeypatch, judge, settings | {"judging": judging}, tmp_path / "out")
        assert len(judge.requests) == asked, (content, judging)


def test_how_a_server_is_reached_and_paid_does_not_make_a_run_anew(tmp_path, monkeypatch):
    class Served(FakeJudge):
        model = "tiny"

    monkeypatch.setattr("rlme.judgebench.bench.paid", list)
    monkeypatch.setattr("rlme.judgebench.bench.expected", lambda *a: [])
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(4)])

    def asked(model: str = "tiny", **endpoint) -> int:
        judge = Served()
        judge.model = model
        judges = [{"name": "j", "endpoint": {"base_url": "http://a/v1"} | endpoint}]
        with_judge(monkeypatch, judge, {"judges": judges, "sets": [source]}, tmp_path / "out")
        return len(judge.requests)

    priced = {"prices": {"input": 1.0}, "max_cost": 0.1}
    assert [asked(), asked(**priced), asked(base_url="http://b", api_key_env="K", retries=0, deadline=5.0)] == [8, 0, 0]
    assert [asked(extra_body={"cache_prompt": False}), asked("large")] == [8, 8]


@pytest.mark.parametrize("cut, asked", [(20, 2), (0, 0)])
def test_a_cut_line_costs_only_its_item(tmp_path, monkeypatch, cut, asked):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(4)])
    settings, out = {"judges": ["x"], "sets": [source]}, tmp_path / "out"
    with_judge(monkeypatch, FakeJudge(), settings, out)
    saved = out / "verdicts.jsonl"
    whole, (run,) = saved.read_bytes(), load_recorded(str(saved))
    saved.write_bytes(whole[: len(whole) - cut])
    judge = FakeJudge()
    with_judge(monkeypatch, judge, settings, out)
    assert len(judge.requests) == asked
    (again,) = load_recorded(str(saved))
    assert [(r.item, r.given) for r in again.records] == [(r.item, r.given) for r in run.records]
    assert not list(out.glob("*.partial"))
    saved.write_bytes(whole[20:])  # cut elsewhere: verdicts would be lost
    with pytest.raises(InputError, match="line 1: not valid JSON"):
        with_judge(monkeypatch, FakeJudge(), settings, out)


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    run = run_judge(FakeJudge())
    save_records([run], tmp_path / "verdicts.jsonl")

    def killed():
        yield run
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_records(killed(), tmp_path / "verdicts.jsonl")
    assert load_recorded(str(tmp_path / "verdicts.jsonl")) == [run]


def test_one_process_at_a_time(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(0, x_verdicts={"False": "1", "True": "1"})])
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(InputError, match="out: another process is judging in it"):
        with_judge(monkeypatch, FakeJudge(), {"judges": ["x"], "sets": [source]}, out)
    assert with_judge(monkeypatch, FakeJudge(), {"judges": ["x"], "sets": [source]}, out).exit_code == 0


# broken rows, missing numbers, low label mass


TALK = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "x"}]
MT = {"conversation_a": TALK, "conversation_b": TALK, "winner": "model_a", "turn": 1}
POINT = {"prompt": "p", "answer": "a", "label": True}


@pytest.mark.parametrize(
    "reader, row, message",
    [
        ("pairs", pair(0) | {"label": ["1"]}, r"the column 'label' is \['1'\], expected one label"),
        ("pairs", pair(0) | {"label": {"a": 1}}, "the column 'label' is {'a': 1}, expected one label"),
        ("points", POINT | {"label": [0]}, r"the column 'label' is \[0\], expected one label"),
        ("mtbench", MT | {"conversation_a": TALK[:1]}, "'conversation_a' is no conversation up to turn 1"),
        ("mtbench", MT | {"turn": 2}, "'conversation_a' is no conversation up to turn 2, expected at least 4 messages"),
        ("mtbench", MT | {"conversation_b": "x"}, "'conversation_b' is no conversation"),
        ("mtbench", MT | {"turn": "one"}, "'turn' is 'one', expected a whole number from 1"),
        ("mtbench", MT | {"turn": 0}, "'turn' is 0, expected a whole number from 1"),
        ("mtbench", MT | {"winner": None}, "the column 'winner' is missing"),
    ],
)
def test_a_broken_row_is_named(tmp_path, reader, row, message):
    good = {"pairs": pair(1), "points": POINT, "mtbench": MT}[reader]
    source = write_rows(tmp_path / "x.jsonl", [good, row])
    with pytest.raises(InputError, match=f"x.jsonl, row 2: .*{message}"):
        load_set(source, reader=reader)


@pytest.mark.parametrize(
    "reader, row",
    [
        ("pairs", pair(0) | {"instruction": "Q \ud83d"}),
        ("pairs", pair(0, reference=["a", "b \udc00"])),
        ("points", POINT | {"source": {"x": "\ud83d"}}),
    ],
)
def test_half_a_character_is_named_by_row(tmp_path, reader, row):
    source = tmp_path / "x.json"
    source.write_text(json.dumps([{"pairs": pair(1), "points": POINT}[reader], row]))
    with pytest.raises(InputError, match=r"x.json, row 2: .*half of a"):
        load_set(str(source), reader=reader)


def test_labels_that_are_lists(tmp_path):
    with pytest.raises(InputError, match="expected two spellings"):
        load_set(write_rows(tmp_path / "x.jsonl", [pair(0)]), labels=[[1], [2]])


def test_without_resamples_there_is_no_interval_and_no_p_value():
    runs = [run_judge(FakeJudge(name="good")), run_judge(FakeJudge(lambda o, i, r: 0.0, bias=1, name="first"))]
    result = analyse(runs, resamples=0)
    (test,) = result["tests"]
    assert test["p_bootstrap"] is test["p_holm"] is None
    text = markdown(result)
    assert "| toy | good | refeval | 100.0 | 100.0 |" in text
    for shown in (text, page(result)):
        assert "nan" not in shown and "None" not in shown


def test_a_kappa_that_is_not_defined_is_null(tmp_path):
    rows = [pair(i, 1, x_verdicts={"False": "1", "True": "1"}) for i in range(4)]
    result = analyse(load_recorded(write_rows(tmp_path / "x.jsonl", rows)), resamples=10)
    assert json.loads(json.dumps(result, allow_nan=False))["runs"][0]["llmbar"]["kappa_False"] is None
    assert "nan" not in markdown(result)


def test_low_label_mass_is_said_once_for_every_judge_and_protocol(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2, reference=f"right {i} .") for i in range(10)])
    settings = {"judges": ["x"], "sets": [source], "protocols": ["base", "refeval"]}
    said = "warning: evaluator 'fake' puts only 20% of its probability on the labels of protocol"
    for _ in range(2):  # asked, and kept from before
        output = " ".join(with_judge(monkeypatch, FakeJudge(mass=0.2), settings, tmp_path / "low").output.split())
        assert output.count(said) == 2 and f"{said} 'refeval'; its verdicts" in output
    quiet = settings | {"judging": {"mass_warning": 0.1}}
    assert "warning" not in with_judge(monkeypatch, FakeJudge(mass=0.2), quiet, tmp_path / "quiet").output


def test_options_hold_for_sets_of_every_spelling(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(6)])
    for sets in (f"pairs:{source}", {"source": source}, [source]):
        judge = FakeJudge()
        monkeypatch.setattr("rlme.evaluators.build.build_evaluators", lambda *a, judge=judge, **k: [judge])
        (tmp_path / "c.yaml").write_text(json.dumps({"judges": ["j"], "sets": sets, "resamples": 10}))
        CliRunner().invoke(app, [str(tmp_path / "c.yaml"), "--limit", "2"], catch_exceptions=False)
        assert len(judge.requests) == 4, sets


def test_recorded_verdicts_take_labels_and_a_limit(tmp_path):
    rows = [pair(i, "left" if i % 2 else "right", x_verdicts={"False": "1", "True": "2"}) for i in range(4)]
    source = write_rows(tmp_path / "x.jsonl", rows)
    arguments = ["--verdicts", source, "--labels", "left,right", "--limit", "3", "--resamples", "10"]
    arguments += ["--json", str(tmp_path / "out.json")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert found["judged"] == 3


def test_a_folder_of_two_settings_is_read_as_its_last(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(6)])
    monkeypatch.setattr("rlme.evaluators.build.build_evaluators", lambda *a, **k: [FakeJudge()])
    (tmp_path / "c.yaml").write_text(json.dumps({"judges": ["j"], "sets": [source], "resamples": 10}))
    for more in (["--limit", "2"], []):
        CliRunner().invoke(app, [str(tmp_path / "c.yaml"), "-o", str(tmp_path / "o"), *more], catch_exceptions=False)
    kept = str(tmp_path / "o" / "verdicts.jsonl")
    told = CliRunner().invoke(app, ["--verdicts", kept, "--json", str(tmp_path / "out.json")], catch_exceptions=False)
    assert "1 earlier runs" in told.output
    assert [run["judged"] for run in json.loads((tmp_path / "out.json").read_text())["runs"]] == [6]
    with pytest.raises(InputError, match="leave out --column, --labels and --limit"):
        CliRunner().invoke(app, ["--verdicts", kept, "--limit", "1"], catch_exceptions=False)


def test_items_that_failed_in_a_bad_hour_are_asked_again(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "toy.jsonl", [pair(i, 1 + i % 2) for i in range(4)])
    settings: dict = {"judges": ["j"], "sets": [source]}
    asked = []
    for fail_on in ("Question 2?", "Question 2?", None, None):
        judge = FakeJudge(fail_on=fail_on) if fail_on else FakeJudge()
        with_judge(monkeypatch, judge, settings, tmp_path / "out")
        asked.append(len(judge.requests))
    assert asked == [8, 2, 2, 0]

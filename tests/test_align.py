"""The alignment pipeline on a tiny random model: stages, skipping, resuming, bad input."""

import json
import re
import warnings
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console
from transformers import GraniteMoeConfig
from typer.testing import CliRunner

from rlme.align import run_models, winrates
from rlme.align.checks import check_output
from rlme.align.cli import align
from rlme.align.config import AlignConfig
from rlme.align.inputs import compare_inputs, judge_inputs
from rlme.align.pipeline import Alignment
from rlme.align.prompts import load_prompts
from rlme.align.stage import Lines, Stage, fingerprint
from rlme.align.winrates import Match, cells, table
from rlme.commands import recipe_files
from rlme.config_file import read_yaml, validate
from rlme.errors import InputError, RunStopped
from rlme.folders import locked
from rlme.models import load_tokenizer
from tests.fake_judge import FakeJudge, text_of
from tests.test_architectures import save

app = typer.Typer()
app.command()(align)


def write_rows(path: Path, n: int = 8, **columns: object) -> str:
    rows = [{"prompt": f"Question {i}?", "reference": f"The answer is {i} ."} | columns for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny_config(tmp_path: Path, model: Path, **sections: object) -> AlignConfig:
    content: dict = {
        "model": str(model),
        "data": {"train": write_rows(tmp_path / "rows.jsonl"), "hold_out": 2},
        "sft": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "max_tokens": 128},
        "sample": {"n": 3, "max_tokens": 8, "prompts_at_once": 2},
        "judge": {"schedule": "unordered"},
        "dpo": {"batch_size": 2, "learning_rate": 1e-3, "max_tokens": 128},
        "compare": {"resamples": 20},
        "output": str(tmp_path / "run"),
    }
    for name, values in sections.items():
        content[name] = (content[name] | values) if isinstance(values, dict) and name in content else values
    return validate(AlignConfig, content, "test")


def run(config: AlignConfig) -> tuple[list[dict], str]:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    rows = Alignment(config, console).run()
    return rows, console.export_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_policy_dir):
    """One whole run, which the tests below only read or copy."""
    config = tiny_config(tmp_path_factory.mktemp("align"), tiny_policy_dir)
    rows, said = run(config)
    return config, rows, said


def test_all_stages_leave_their_output(finished):
    config, rows, said = finished
    folder = config.folder
    assert "sft: 6 references" in said
    assert "sample: 6 prompts x 3 answers" in said
    answers = Lines(folder / "round-1/sample/answers.jsonl").read()
    scores = Lines(folder / "round-1/judge/scores.jsonl").read()
    assert [r["index"] for r in answers] == [r["index"] for r in scores] == list(range(6))
    assert all(len(r["answers"]) == 3 for r in answers)
    different = [len(set(r["answers"])) for r in answers]
    assert f"judge: {sum(n * (n - 1) // 2 for n in different)} calls for 6 prompts" in said
    pairs = Lines(folder / "round-1/pairs/pairs.jsonl").read()
    assert pairs
    for pair in pairs:
        row = scores[pair["index"]]
        known = [s for s in row["scores"] if s is not None]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(known), min(known))
        assert pair["margin"] == pytest.approx(max(known) - min(known))
        assert answers[pair["index"]]["answers"][row["best"]] == pair["chosen"]
    assert [(r["against"], r["model"]) for r in rows] == [("base", "sft"), ("base", "dpo"), ("sft", "dpo")]
    assert all(r["judged"] == 2 for r in rows)
    assert "# Win rates" in (folder / "compare/report.md").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["judge"]["protocol"] == "refeval"


def test_the_trained_models_load_and_differ(finished):
    import torch
    from transformers import AutoModelForCausalLM

    config, *_ = finished
    paths = [config.model.path, config.folder / "sft/model", config.folder / "round-1/dpo/model"]
    weights = [AutoModelForCausalLM.from_pretrained(p).model.layers[0].mlp.up_proj.weight for p in paths]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_sft_learns_the_references(finished):
    config, *_ = finished
    info = json.loads((config.folder / "sft/stage.json").read_text())["info"]
    assert info["updates"] == 2 and info["last_loss"] < info["first_loss"]


def test_a_second_run_skips_everything(finished):
    config, rows, _ = finished
    before = {p: p.stat().st_mtime_ns for p in config.folder.rglob("*") if p.is_file() and p.name != "config.yaml"}
    again, said = run(config)
    assert again == rows
    for stage in ("sft", "sample", "judge", "pairs", "dpo", "compare"):
        assert f"{stage}: done before, skipped" in said
    assert before == {p: p.stat().st_mtime_ns for p in before}


def copy_of(config: AlignConfig, tmp_path: Path, **changes: object) -> AlignConfig:
    import shutil

    shutil.copytree(config.folder, tmp_path / "copy")
    return config.model_copy(update={"output": str(tmp_path / "copy"), **changes})


def test_a_changed_stage_is_done_anew_and_all_after_it(finished, tmp_path):
    config, *_ = finished
    changed = copy_of(config, tmp_path, judge=config.judge.model_copy(update={"protocol": "base"}), compare=None)
    _, said = run(changed)
    assert "sft: done before" in said and "sample: done before" in said
    assert "judge: its inputs have changed, done anew" in said and "dpo: done before" not in said


def test_another_wording_of_an_own_protocol_is_judged_anew(finished, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Which is better?\n{{ output_a }}\n{{ output_b }}")
    judge = finished[0].judge.model_copy(update={"protocol": str(file)})
    copy = copy_of(finished[0], tmp_path, judge=judge, compare=None)
    assert "judge: its inputs have changed, done anew" in run(copy)[1]
    assert "judge: done before, skipped" in run(copy)[1]
    file.write_text("Which one is better?\n{{ output_a }}\n{{ output_b }}")
    _, said = run(copy)
    assert "judge: its inputs have changed, done anew" in said and "sample: done before, skipped" in said


def test_what_changes_no_verdict_is_not_paid_for_again(finished, tmp_path, monkeypatch):
    def inputs(judge: dict, compare: dict) -> list[str]:
        config = tiny_config(tmp_path, tmp_path, judge=judge, compare=compare)
        return [fingerprint(judge_inputs(config, [])), fingerprint(compare_inputs(config))]

    def served(**keys: object) -> dict:
        return {"evaluators": [{"endpoint": {"base_url": "http://a/v1", "model": "m", "prices": {"input": 1}} | keys}]}

    free = {"base_url": "http://b/v1", "max_cost": 2, "deadline": 9, "concurrency": 1, "retries": 0, "outage": 1}
    free |= {"api_key_env": "KEY", "prices": {"input": 2}, "requests_per_minute": 5, "tokens_per_minute": 5}
    elsewhere = {"max_failure_rate": 1, "judging": {"cache": "x.sqlite", "cache_mb": 5, "mass_warning": 0}}
    before = inputs(served(), served())
    assert inputs(served(**free) | elsewhere, served(**free) | {"resamples": 5}) == before
    for key, value in {"model": "n", "revision": "2", "api": "chat", "extra_body": {"a": 1}}.items():
        assert not {*inputs(served(**{key: value}), served())} & {*before}
        assert inputs(served(), served(**{key: value}))[1] != before[1]
    assert not {*inputs(served() | {"judging": {"max_context_tokens": 99}}, served())} & {*before}
    config, rows, _ = finished
    monkeypatch.setattr(winrates, "play", None)
    again, said = run(copy_of(config, tmp_path, compare=config.compare.model_copy(update={"resamples": 50})))
    assert "compare: done before, skipped" in said
    assert again[0]["soft"]["value"] == rows[0]["soft"]["value"]
    assert json.loads((tmp_path / "copy/compare/results.json").read_text())["resamples"] == 50


def test_other_data_in_a_question_is_judged_anew(tmp_path, tiny_policy_dir):
    judge = {"questions": {"q": "Is it {{ rubric }}?"}}
    config = tiny_config(tmp_path, tiny_policy_dir, sft=None, compare=None, judge=judge)
    for columns, said_of_it in (
        ({"rubric": "short", "note": 1}, ""),
        ({"rubric": "short", "note": 2}, "judge: done before, skipped"),
        ({"rubric": "long"}, "judge: its inputs have changed, done anew"),
    ):
        write_rows(tmp_path / "rows.jsonl", **columns)
        said = run(config)[1]
        assert said_of_it in said and ("sample: done before" in said) == bool(said_of_it)


def test_a_second_run_at_the_same_time_is_kept_out(finished, tmp_path, monkeypatch):
    copy = copy_of(finished[0], tmp_path)
    with (
        locked(copy.folder, "busy"),
        pytest.raises(InputError, match="another rlme align is at work in it: wait for it, or"),
    ):
        run(copy)
    monkeypatch.setattr(Alignment, "_start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(copy)
    with locked(copy.folder, "busy"):  # given back after an error
        pass


def test_failed_matches_are_named_and_asked_again(tmp_path, tiny_policy_dir, monkeypatch):
    judge = FakeJudge(lambda o, i, r: len(o) / 10)
    use_judge(monkeypatch, judge)
    sections = {"sft": None, "sample": {"n": 3, "max_tokens": 8}, "output": str(tmp_path / "run")}
    run(tiny_config(tmp_path, tiny_policy_dir, **sections, compare=None))
    compare = {"resamples": 5, "temperature": 1.0}  # answers that differ
    judge.fail_on = "Question"
    with pytest.raises(RunStopped, match=r"compare: 2 of 2 matches have no score \(timeout x4\), more than judge.max"):
        run(tiny_config(tmp_path, tiny_policy_dir, **sections, compare=compare))
    judge.fail_on = "Question 7"
    tolerant = tiny_config(tmp_path, tiny_policy_dir, **sections, compare=compare, judge={"max_failure_rate": 0.5})
    rows, said = run(tolerant)
    assert rows[0]["judged"] == 1 and "compare: matches 2, judged 1, failures (2 timeout)" in said
    judge.fail_on = None
    judge.requests.clear()
    rows, said = run(tolerant)
    assert rows[0]["judged"] == 2 and len(judge.requests) == 2
    assert "compare: 2 calls for 1 matches of 2 models" in said and "dpo: done before, skipped" in said
    assert "compare: done before, skipped" in run(tolerant)[1]


def test_the_calls_of_the_comparison_are_counted_with_its_references(tmp_path, tiny_policy_dir, monkeypatch):
    judge = FakeJudge(lambda o, i, r: len(o) / 10)
    use_judge(monkeypatch, judge)
    rows = [{"prompt": f"Question {i}?", "reference": ["one", "two", "three"][: i + 1]} for i in range(3)]
    (tmp_path / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "several.jsonl"), "hold_out": 2}
    sections = {"sft": None, "data": data, "compare": {"temperature": 1.0, "resamples": 0}}
    said = run(tiny_config(tmp_path, tiny_policy_dir, **sections))[1]
    assert "compare: 10 calls for 2 matches of 2 models on 2 prompts" in said  # 2 orders x (2 + 3) references
    assert sum("Question 0" not in text_of(request.context) for request in judge.requests) == 10


def test_an_interrupted_stage_continues_where_it_was(finished, tmp_path, monkeypatch):
    config, *_ = finished
    copy = copy_of(config, tmp_path, compare=None)
    whole = Lines(config.folder / "round-1/sample/answers.jsonl").read()
    scores = Lines(config.folder / "round-1/judge/scores.jsonl").read()
    for name, file, lines in (("sample", "answers", 3), ("judge", "scores", 5)):
        folder = copy.folder / "round-1" / name
        state = json.loads((folder / "stage.json").read_text()) | {"done": False}
        (folder / "stage.json").write_text(json.dumps(state))
        text = (folder / f"{file}.jsonl").read_text().split("\n")
        (folder / f"{file}.jsonl").write_text("\n".join(text[:lines]) + "\n" + text[lines][:5])  # cut off in a line
    asked: list[int] = []
    real = run_models.sample
    monkeypatch.setattr(
        run_models, "sample", lambda m, prompts, *a, **k: asked.append(len(prompts)) or real(m, prompts, *a, **k)
    )
    run(copy)
    assert asked == [2, 2]  # prompts 2 to 5: the third line belonged to an unfinished chunk of two
    assert Lines(copy.folder / "round-1/sample/answers.jsonl").read() == whole
    again = Lines(copy.folder / "round-1/judge/scores.jsonl").read()
    for a, b in zip(again, scores, strict=True):
        assert a["scores"] == pytest.approx(b["scores"]) and a["best"] == b["best"]


def test_interrupted_training_ends_with_the_same_weights(finished, tmp_path):
    from safetensors.torch import load_file

    config, *_ = finished
    often = config.dpo.model_copy(update={"checkpoint_every": 1})
    whole = copy_of(config, tmp_path / "whole", dpo=often, compare=None)
    run(whole)
    folder = whole.folder / "round-1/dpo"
    expected = load_file(folder / "model/model.safetensors")
    (last,) = (folder / "checkpoints").glob("checkpoint-*")
    steps = int(last.name.split("-")[1])
    assert steps >= 2
    half = copy_of(whole, tmp_path / "half", dpo=often, compare=None)
    folder = half.folder / "round-1/dpo"
    # The same training stopped right after its first checkpoint.
    import shutil

    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    state = json.loads((folder / "stage.json").read_text()) | {"done": False}
    (folder / "stage.json").write_text(json.dumps(state))

    class Stop(Exception):
        pass

    from rlme.align import train

    class Interrupted(train._Bar):
        def on_save(self, args, state, control, **kwargs):
            raise Stop

    original, train._Bar = train._Bar, Interrupted
    try:
        with pytest.raises(Stop):
            run(half)
    finally:
        train._Bar = original
    assert (folder / "checkpoints/checkpoint-1").is_dir() and not (folder / "model").exists()
    run(half)
    found = load_file(folder / "model/model.safetensors")
    assert all(found[k].equal(expected[k]) for k in expected)


def use_judge(monkeypatch, evaluator) -> None:
    monkeypatch.setattr(run_models, "build_evaluators", lambda *a, **k: [evaluator])


def test_two_rounds_from_the_new_model(tmp_path, tiny_policy_dir, monkeypatch):
    use_judge(monkeypatch, FakeJudge(lambda o, i, r: len(o) / 10))
    config = tiny_config(tmp_path, tiny_policy_dir, rounds=2, sft=None, data={"hold_out": 1})
    rows, said = run(config)
    assert "round 2, sample: 7 prompts" in said
    assert [r["model"] for r in rows] == ["dpo-1", "dpo-2", "dpo-2"]
    first, second = (Lines(config.folder / f"round-{n}/sample/answers.jsonl").read() for n in (1, 2))
    assert first != second


def test_a_lora_run_saves_merged_models(tmp_path, tiny_policy_dir, monkeypatch):
    use_judge(monkeypatch, FakeJudge(lambda o, i, r: len(o) / 10))
    config = tiny_config(tmp_path, tiny_policy_dir, lora={"r": 2}, compare=None)
    run(config)
    assert (config.folder / "round-1/dpo/model/config.json").is_file()
    assert not (config.folder / "round-1/dpo/model/adapter_config.json").exists()


def test_candidates_scored_by_questions(tmp_path, tiny_policy_dir):
    questions = {"like": "Is the answer like {{ reference }}?", "short": {"ask": "Is it short?", "weight": 0.5}}
    config = tiny_config(tmp_path, tiny_policy_dir, judge={"questions": questions}, compare=None, sft=None)
    _, said = run(config)
    assert "judge: 36 calls for 6 prompts" in said
    for question in questions:
        assert len(re.findall(f"'live' puts only .% of its .* on the labels of question '{question}'", said)) == 1
    scores = Lines(config.folder / "round-1/judge/scores.jsonl").read()
    assert all(s < 0 for row in scores for s in row["scores"])


def test_a_judge_that_fails_too_often_stops_the_run_and_is_asked_again(tmp_path, tiny_policy_dir, monkeypatch):
    flaky = FakeJudge(lambda o, i, r: len(o) / 10, fail_on="Question")
    use_judge(monkeypatch, flaky)
    config = tiny_config(tmp_path, tiny_policy_dir, sft=None, compare=None)
    with pytest.raises(RunStopped, match=r"18 of 18 candidates have no score \(timeout x"):
        run(config)
    assert not (config.folder / "round-1/pairs").exists()
    flaky.fail_on = None
    run(config)
    assert (config.folder / "round-1/dpo/model").is_dir()


def test_all_ties_stop_before_dpo(tmp_path, tiny_policy_dir, monkeypatch):
    use_judge(monkeypatch, FakeJudge(lambda o, i, r: 0.0))
    config = tiny_config(tmp_path, tiny_policy_dir, sft=None, compare=None, judge={"schedule": "ordered"})
    with pytest.raises(InputError, match=r"no preference pair is left \(6 tie\)"):
        run(config)
    assert not (config.folder / "round-1/pairs").exists() and not (config.folder / "round-1/dpo").exists()


def test_identical_candidates_stop_before_dpo(tmp_path, tiny_policy_dir, monkeypatch):
    use_judge(monkeypatch, FakeJudge())
    config = tiny_config(
        tmp_path, tiny_policy_dir, sft=None, compare=None, sample={"temperature": 1e-6, "max_tokens": 2}
    )
    with pytest.raises(InputError, match=r"no preference pair is left \(6 identical candidates\)"):
        run(config)


def test_rows_without_a_reference(tmp_path, tiny_policy_dir):
    source = tmp_path / "some.jsonl"
    rows = [{"prompt": f"Q{i}?", "reference": "x" if i else " "} for i in range(3)]
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = load_tokenizer(tiny_policy_dir)
    config = tiny_config(tmp_path, tiny_policy_dir, data={"train": str(source), "hold_out": 0})
    with pytest.raises(
        InputError, match=r"some.jsonl, row 1: the reference \(column 'reference'\) is missing or empty"
    ):
        load_prompts(config, tokenizer)
    config.data.without_reference = "drop"
    found = load_prompts(config, tokenizer)
    assert len(found.train) == 2 and "1 without a reference, dropped" in found.notes
    config.data.reference = "gold"
    with pytest.raises(InputError, match="no column 'gold' with reference outputs"):
        load_prompts(config, tokenizer)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"judge": {"protocol": "refevil"}}, "unknown judging protocol 'refevil'"),
        ({"judge": {"schedul": "ordered"}}, "unknown key 'judge.schedul'; did you mean 'schedule'"),
        ({"judge": {"evaluators": []}}, "judge.evaluators is empty"),
        ({"sample": {"n": 1}}, "sample.n is 1, expected"),
        ({"data": {"train": "x.jsonl", "eval": "y.jsonl", "hold_out": 3}}, "both set"),
        ({"compare": {"also": {"a/b": "x"}}}, "compare.also"),
        ({"compare": {"also": {"dpo": "x"}}}, "the name 'dpo' is taken by a model of this run"),
        ({"judge": {"evaluators": ["a/x", "b/x"]}}, "judge.evaluators: two are called 'x'"),
        ({"compare": {"evaluators": [{"model": "x", "weight": 0}]}}, "the weight of 'x' is 0"),
        ({"judge": {"questions": {"q": {"ask": "Is it?", "weight": 0}}}}, "judge.questions: all weights are 0"),
        ({"dpo": {"batch_size": 64, "device_batch_size": 48}}, "device_batch_size is 48, expected a divisor"),
        (
            {"judge": {"questions": {"q": "Is it?"}, "evaluators": [{"model": "x", "weight": 0}]}, "compare": None},
            "judge.evaluators: all weights are 0",
        ),
    ],
)
def test_bad_configurations(tmp_path, tiny_policy_dir, content, message):
    file = tmp_path / "bad.yaml"
    rows = write_rows(tmp_path / "rows.jsonl")
    file.write_text(yaml.safe_dump({"model": str(tiny_policy_dir), "data": rows} | content))
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, [str(file), "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path, tiny_policy_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        run(tiny_config(tmp_path, tiny_policy_dir))


def test_trl_arguments_are_checked(tmp_path, tiny_policy_dir):
    config = tiny_config(tmp_path, tiny_policy_dir, sft={"trl": {"optimm": "adamw_torch"}})
    with pytest.raises(InputError, match=r"sft.trl.optimm is no argument of TRL's SFTConfig; did you mean 'optim'\?"):
        run(config)
    config = tiny_config(tmp_path, tiny_policy_dir, sft={"trl": {"learning_rate": 1.0}})
    with pytest.raises(InputError, match=r"sft.trl.learning_rate is set by this project"):
        run(config)
    Alignment(tiny_config(tmp_path, tiny_policy_dir, dpo={"trl": {"loss_type": "hinge"}}), Console(quiet=True))


NOT_CAUSAL = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"dpo": {"trl": {"nosuch": 1}}}, "dpo.trl.nosuch is no argument of TRL's DPOConfig"),
        ({"dpo": {"trl": {"weight_decay": "hello"}}}, "dpo.trl.weight_decay is 'hello', expected valid number"),
        ({"dpo": {"trl": {"warmup_steps": "abc"}}}, "dpo.trl.warmup_steps is set by this project"),
        ({"dpo": {"trl": {"report_to": "nobody"}}}, "dpo.trl.report_to: TRL does not accept these settings: nobody"),
        ({"dpo": {"trl": {"eval_strategy": "steps"}}}, "dpo.trl.eval_strategy is 'steps', expected no"),
        ({"compare": {"also": {"x": "./none"}}}, r"compare.also.x: model './none': no such file or folder"),
        ({"compare": {"also": {"x": "BERT"}}}, r"compare.also.x: model .* is no causal language model"),
        ({"compare": {"also": {"x": "WORDS"}}}, r"compare.also.x: .* has another tokenizer than"),
        ({"compare": {"evaluators": ["./none"]}}, r"compare.evaluators: model './none': no such file"),
        ({"compare": {"protocol": "refeval"}, "data": {"hold_out": 0, "eval": "BARE"}}, "but row 1 of .* has none"),
        ({"judge": {"evaluators": ["./none"]}}, r"judge.evaluators: model './none': no such file"),
        ({"judge": {"questions": {"q": "Like {{ nosuch }}?"}}}, "'nosuch'"),
    ],
)
def test_what_later_stages_need_is_checked_before_the_first(
    tmp_path, tiny_policy_dir, tiny_word_dir, sections, message
):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps(NOT_CAUSAL))
    (tmp_path / "bare.jsonl").write_text('{"prompt": "Question?"}\n')
    text = json.dumps(sections).replace("BERT", str(tmp_path / "bert")).replace("WORDS", str(tiny_word_dir))
    sections = json.loads(text.replace("BARE", str(tmp_path / "bare.jsonl")))
    with pytest.raises(InputError, match=message):
        run(tiny_config(tmp_path, tiny_policy_dir, **sections))
    assert not (tmp_path / "run").exists()


def test_only_a_folder_of_this_command_is_written_to(finished, tmp_path, tiny_policy_dir):
    import shutil

    shutil.copytree(finished[0].folder / "sft", tmp_path / "begun/sft")
    check_output(tmp_path / "begun")  # a stage to be skipped may be put there
    taken = tmp_path / "taken"
    taken.mkdir()
    file = taken / "config.yaml"
    for name, content in (("config.yaml", "model: {path: x}\ntrain: {steps: 3}\n"), ("thesis.tex", "")):
        file.unlink(missing_ok=True)
        file = taken / name
        file.write_text(content)
        with pytest.raises(InputError, match="taken exists already, and is no run of rlme align: choose another"):
            run(tiny_config(tmp_path, tiny_policy_dir, output=str(taken)))
        assert [p.name for p in taken.iterdir()] == [name] and file.read_text() == content
    with pytest.raises(InputError, match=r"thesis.tex exists already, and is no run"):
        run(tiny_config(tmp_path, tiny_policy_dir, output=str(file)))
    with pytest.raises(InputError, match=r"output is '.*thesis.tex/x', which cannot be made: Not a directory"):
        run(tiny_config(tmp_path, tiny_policy_dir, output=str(file / "x")))


def test_the_command_says_where_it_cannot_write_and_how_to_go_on(tmp_path, tiny_policy_dir, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Alignment, "_stages", interrupted)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"model": str(tiny_policy_dir), "data": write_rows(tmp_path / "rows.jsonl")}))
    with pytest.raises(InputError, match="cannot be written"):
        CliRunner().invoke(app, [str(file), "--json", str(file / "x.json")], catch_exceptions=False)
    with pytest.raises(RunStopped, match=r"interrupted; the same command goes on with what is in .*out"):
        CliRunner().invoke(app, [str(file), "-o", str(tmp_path / "out")], catch_exceptions=False)


def test_a_judge_with_little_label_mass_is_named_once(tmp_path, tiny_policy_dir, monkeypatch):
    use_judge(monkeypatch, FakeJudge(lambda o, i, r: len(o) / 10, mass=0.2))
    sections = {"sft": None, "rounds": 2, "data": {"hold_out": 1}}
    _, said = run(tiny_config(tmp_path, tiny_policy_dir, **sections, output=str(tmp_path / "low")))
    warning = "warning: evaluator 'fake' puts only 20% of its probability on the labels of protocol 'refeval'"
    assert said.count("warning:") == said.count(warning) == 1
    use_judge(monkeypatch, FakeJudge(lambda o, i, r: len(o) / 10, mass=0.9))
    _, said = run(tiny_config(tmp_path, tiny_policy_dir, **sections))
    assert "warning:" not in said


@pytest.mark.parametrize("name", [n for n in recipe_files() if n.startswith("align") or n == "paper-refeval-llama3-8b"])
def test_recipes_parse_and_run_small(name, tmp_path, tiny_policy_dir):
    content = read_yaml(recipe_files()[name])
    validate(AlignConfig, content, name)  # as shipped
    content["model"] = str(tiny_policy_dir)
    content["data"] = {"train": write_rows(tmp_path / "rows.jsonl", 5), "hold_out": 1}
    content["sample"] = content.get("sample", {}) | {"max_tokens": 6}
    content["output"] = str(tmp_path / "run")
    content["judge"] = content.get("judge", {}) | {"evaluators": ["live"]}
    for stage in ("sft", "dpo"):
        content[stage] = (content.get(stage) or {}) | {"max_tokens": 200}
    rows, _ = run(validate(AlignConfig, content, name))
    assert {r["model"] for r in rows} >= {"dpo", "sft"}


def test_the_command_checks_without_loading(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"model": "no/such-model", "data": "none.jsonl"}))
    result = CliRunner().invoke(app, [str(file), "--check"], catch_exceptions=False)
    assert result.exit_code == 0 and "fine" in result.output


# stages and win rates


def test_a_stage_of_other_inputs_is_removed(tmp_path):
    stage = Stage(tmp_path / "s", fingerprint(1))
    assert stage.begin() is False
    (stage.folder / "half").touch()
    assert stage.begin() is True and not stage.done
    stage.finish({"n": 1})
    assert stage.done and stage.info == {"n": 1}
    other = Stage(tmp_path / "s", fingerprint(2))
    assert not other.done and other.begin() is False
    assert not (stage.folder / "half").exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/thesis.tex").touch()
    with pytest.raises(InputError, match="is not a stage of `rlme align`"):
        Stage(tmp_path / "sft", fingerprint(1)).begin()
    assert (tmp_path / "sft/thesis.tex").exists()


def test_win_rates_by_hand():
    matches = [Match(i, "a", "b", p, p, (10, 10)) for i, p in enumerate([0.1, 0.2, 0.9, 0.5])]
    matches.append(Match(4, "a", "b", None, 0.3, (10, 10)))
    (row,) = table(matches, ["a", "b"], resamples=50, seed=0)
    assert (row["model"], row["against"], row["judged"], row["prompts"]) == ("b", "a", 4, 5)
    assert row["win_rate"]["value"] == pytest.approx(2.5 / 4)
    assert row["soft"]["value"] == pytest.approx(1 - 1.7 / 4)
    assert row["length_controlled"]["value"] == pytest.approx(2.5 / 4)
    assert row["equal"]["value"] == 1
    same = [Match(i, "a", "b", 0.5, 0.5, (10, 10), same=True) for i in (5, 6)]
    (more,) = table([*matches, *same, Match(7, "a", "b", 0.9, 0.1, (10, 10))], ["a", "b"], resamples=50, seed=0)
    assert more["equal"]["value"] == pytest.approx(4 / 5)  # nobody was asked about equal answers
    (none,) = table(same, ["a", "b"], resamples=50, seed=0)
    assert none["equal"]["value"] is None and cells(none)[6] == ""


def test_wins_that_length_explains_vanish_at_equal_length():
    matches = [
        Match(i, "a", "b", p, p, (10, n)) for i, (p, n) in enumerate([(0.1, 40), (0.9, 3)] * 10 + [(0.1, 40)] * 10)
    ]
    (row,) = table(matches, ["a", "b"], resamples=0, seed=0)
    assert row["win_rate"]["value"] == pytest.approx(2 / 3)
    assert abs(row["length_controlled"]["value"] - 0.5) < 0.1


def test_a_mixture_whose_configuration_names_its_experts_otherwise(tmp_path, tiny_policy_dir):
    """(TRL reads `num_experts`.)"""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteMoeConfig(**sizes, num_hidden_layers=2, num_local_experts=4, pad_token_id=0, eos_token_id=2)
    model = save(config, tiny_policy_dir, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*correct, but slower")  # what sft turns on stays off elsewhere
        run(tiny_config(tmp_path, model, sample={"n": 2}, compare=None))
    saved = json.loads((tmp_path / "run/round-1/dpo/model/config.json").read_text())
    assert saved["num_local_experts"] == 4 and "num_experts" not in saved

"""Every mistake a user can make: one sentence naming the key or file, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlme.cli import main
from rlme.errors import InputError
from rlme.training.run import check_same
from rlme.training.run_folder import RunFolder
from tests.tiny_runs import PROMPTS, tiny_config, write_jsonl

Change = Callable[[dict[str, Any], Path], None]


def put(path: str, value: Any) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config.setdefault(key, {})
        config[last] = value

    return change


def malformed_line(config: dict[str, Any], folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps(PROMPTS[0]) + "\n" + '{"question": "cut off\n')


def rows(*records: dict[str, Any]) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        write_jsonl(folder / "prompts.jsonl", list(records))

    return change


def no_chat_template(config: dict[str, Any], folder: Path) -> None:
    config["model"] = str(folder.parent / "base")
    config["evaluators"] = [{"model": "live", "style": "chat"}]


def cannot_spell(config: dict[str, Any], folder: Path) -> None:
    config["evaluators"] = ["live", {"model": config.pop("word_dir"), "name": "words"}]
    config["judging"] = {"template": "reply", "readout": "marker"}


def not_causal(config: dict[str, Any], folder: Path) -> None:
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    config["model"] = str(folder / "bert")


CASES: dict[str, tuple[Change, list[str]]] = {
    "misspelt section": (put("trian", {"steps": 3}), ["trian", "train"]),
    "misspelt key": (put("train.stepz", 3), ["train.stepz", "steps"]),
    "misspelt key of a question": (
        put("questions", {"a": {"ask": "Is it?", "wieght": 1}}),
        ["questions.a.wieght", "weight"],
    ),
    "wrong type": (put("train.steps", "many"), ["train.steps", "many", "integer"]),
    "wrong choice": (put("train.loss", "ppo"), ["train.loss", "ppo", "cispo"]),
    "no questions": (put("questions", {}), ["questions"]),
    "weights all zero": (put("questions", {"a": {"ask": "Is it?", "weight": 0}}), ["weight", "zero"]),
    "evaluator weights all zero": (put("evaluators", [{"model": "live", "weight": 0}]), ["weight", "zero"]),
    "group size 1": (put("train.group_size", 1), ["train.group_size", "1", "2"]),
    "two evaluators of one name": (put("evaluators", ["live", "live"]), ["live", "name"]),
    "misspelt evaluator": (put("evaluators", ["liv"]), ["liv", "live"]),
    "missing data file": (put("data.train", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "malformed line": (malformed_line, ["prompts.jsonl", "line 2"]),
    "line that is no object": (rows(*PROMPTS[:1], [1, 2]), ["prompts.jsonl", "line 2"]),  # type: ignore[arg-type]
    "template variable that is no column": (put("data.prompt", "{{ qestion }}"), ["qestion", "question"]),
    "question variable that is no column": (put("questions", {"a": "Is it about {{ topik }}?"}), ["topik", "topic"]),
    "gold in a question": (put("questions", {"a": "Is it {{ answer_ }}?"}), ["answer_"]),
    "template that is none": (put("judging", {"template": "papre"}), ["papre", "paper"]),
    "model path that does not exist": (put("model", "./no/such/model"), ["no/such/model"]),
    "no causal language model": (not_causal, ["bert"]),
    "gold asked for and absent": (put("data.answer", "solution"), ["solution", "answer"]),
    "gold asked for by the reward": (
        lambda c, f: (c["data"].pop("answer"), put("reward", "rlvr")(c, f)),
        ["rlvr", "data.answer"],
    ),  # type: ignore[dict-item,return-value]
    "gold missing in a row": (
        lambda c, f: (rows(PROMPTS[0], {"question": "And?", "answer": ""})(c, f), put("reward", "rlvr")(c, f)),  # type: ignore[dict-item,return-value]
        ["prompts.jsonl", "row 2"],
    ),
    "anchor without gold": (
        lambda c, f: (c["data"].pop("answer"), put("reward", {"anchor": 0.1})(c, f)),
        ["anchor", "data.answer"],
    ),  # type: ignore[dict-item,return-value]
    "chat without a template": (no_chat_template, ["chat", "template"]),
    "a target the tokenizer cannot spell": (cannot_spell, ["words", "YES"]),
    "unknown TRL argument": (put("trl", {"warmup_stepz": 1}), ["trl.warmup_stepz", "warmup_steps"]),
    "TRL argument of ours": (put("trl", {"num_generations": 4}), ["trl.num_generations", "train.group_size"]),
    "all prompts too long": (put("data.max_prompt_tokens", 2), ["longer"]),
    "misspelt LoRA module": (
        put("lora", {"target_modules": ["q_prj"]}),
        ["lora.target_modules", "q_prj", "q_proj"],
    ),
    "TRL argument of another type": (put("trl", {"max_grad_norm": "abc"}), ["trl.max_grad_norm", "abc", "number"]),
    "no accumulation": (put("trl", {"gradient_accumulation_steps": 0}), ["trl.gradient_accumulation_steps", "1"]),
    "TRL argument that needs what is not there": (put("trl", {"report_to": "nosuch"}), ["trl.report_to", "nosuch"]),
    "no number": (put("questions", {"a": {"ask": "Is it?", "weight": float("nan")}}), ["questions.a.weight", "nan"]),
    "name with a slash": (put("questions", {"a/b": "Is it?"}), ["a/b", "slash"]),
    "template without the question": (put("judging.template", "{{ completion }}?"), ["'correct'", "{{ question }}"]),
    "template without the answer": (put("judging.template", "{{ question }}"), ["'correct'", "{{ completion }}"]),
    "output under a file": (lambda c, f: put("output", str(f / "prompts.jsonl" / "run"))(c, f), ["output", "prompts"]),
    "another batch than ours": (put("trl", {"steps_per_generation": 2}), ["trl.steps_per_generation", "12", "6"]),
    "accumulation that does not divide": (
        put("trl", {"gradient_accumulation_steps": 4}),
        ["trl.gradient_accumulation_steps", "4", "6"],
    ),
    "no line for a step": (put("trl", {"logging_strategy": "no"}), ["trl.logging_strategy", "metrics.jsonl"]),
    "several batches for one update": (
        put("trl", {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 6}),
        ["trl.steps_per_generation", "1", "trl.gradient_accumulation_steps", "2"],
    ),
    "LoRA of the output layer": (
        put("lora", {"target_modules": ["q_proj", "lm_head"]}),
        ["lora.target_modules", "output layer"],
    ),
    "LoRA modules by a pattern that is none": (
        put("lora", {"target_modules": "*_proj"}),
        ["lora.target_modules", "*_proj"],
    ),
    "a column that only the training data have": (
        lambda c, f: (
            put("questions", {"a": "Is it about {{ topic }}?"})(c, f),
            put("data.eval", str(write_jsonl(f / "e.jsonl", [{"question": "Why?", "answer": "1"}])))(c, f),
        ),  # type: ignore[dict-item,return-value]
        ["data.eval", "topic"],
    ),
    "unknown form of an answer": (put("data.completion_format", "lastnumber"), ["lastnumber"]),
    "half of a surrogate pair": (
        lambda c, f: (f / "prompts.jsonl").write_text('{"question": "\\ud83d", "answer": "1"}\n'),
        ["prompts.jsonl", "line 1", "surrogate"],
    ),
    "empty stop string": (put("train.stop", [""]), ["train.stop", "empty"]),
    "wrong target": (put("questions", {"a": {"ask": "Is it?", "target": "MAYBE"}}), ["MAYBE", "YES"]),
}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "Traceback" not in said.err + said.out
    assert said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize("case", CASES)
def test_bad_configuration(
    case: str, tiny_policy_dir: Path, tiny_base_dir: Path, tiny_word_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "base").symlink_to(tiny_base_dir)
    config = tiny_config(folder, tiny_policy_dir)
    if case.startswith("a target"):
        config["word_dir"] = str(tiny_word_dir)
    change, expected = CASES[case]
    change(config, folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    sentence = run(["train", str(path)], capsys)
    for word in expected:
        assert word in sentence, sentence
    assert not (folder / "run").exists(), "something half-written"


def test_missing_file(tmp_path: Path, capsys: Any) -> None:
    assert "none.yaml" in run(["train", str(tmp_path / "none.yaml")], capsys)


def test_not_yaml(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text("model: [1, 2\ndata: x\n")
    sentence = run(["train", str(tmp_path / "c.yaml")], capsys)
    assert "c.yaml" in sentence and "line" in sentence


def test_a_template_without_quotes(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    text = yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir)).replace("'{{ question }}'", "{{ question }}")
    (tmp_path / "c.yaml").write_text(text)
    sentence = run(["train", str(tmp_path / "c.yaml")], capsys)
    assert "line" in sentence and "quotes" in sentence
    assert "quotes" in run(["train", "quickstart", "--set", "data.prompt={{ question }}"], capsys)


def test_what_would_be_lost_at_the_end_is_said_first(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir)))
    impossible = str(tmp_path / "c.yaml" / "x.json")
    for arguments in (["train", str(tmp_path / "c.yaml")], ["train", "--resume", str(tmp_path)], ["quickstart"]):
        assert "x.json" in run([*arguments, "--json", impossible], capsys)
    assert "--resume" in run(["train", "--resume", str(tmp_path), "-o", str(tmp_path / "other")], capsys)
    assert "data.eval" in run(["quickstart", "--set", "data.eval=null", "-o", str(tmp_path / "q")], capsys)
    assert not (tmp_path / "run").exists() and not (tmp_path / "q").exists()


def test_two_questions_of_one_name(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    text = yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir, questions={"a": "Is it?"}))
    (tmp_path / "c.yaml").write_text(text.replace("  a: Is it?", "  a: Is it?\n  a: Is it really?"))
    sentence = run(["train", str(tmp_path / "c.yaml")], capsys)
    assert "'a'" in sentence and "line" in sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "section.key=value"),
        ("train.stepz=3", "train.stepz"),
        ("evaluators.4.weight=1", "evaluators.4.weight"),
        ("output.name=x", "output"),
    ],
)
def test_bad_override(override: str, expected: str, tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir)))
    assert expected in run(["train", str(tmp_path / "c.yaml"), "--set", override], capsys)


def test_a_run_folder_that_exists_is_never_overwritten(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    config = tiny_config(tmp_path, tiny_policy_dir)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    sentence = run(["train", str(tmp_path / "c.yaml")], capsys)
    assert str(tmp_path / "run") in sentence and "--resume" in sentence
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "mine"


def test_a_check_finds_what_a_run_would_refuse(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir)))
    main_ends(["check", str(tmp_path / "c.yaml")], 0)
    assert "6 prompts" in capsys.readouterr().out
    for change, told in (
        ("data.prompt=qestion", "question"),
        ("trl.nosuch=1", "trl.nosuch"),
        ("data.train=no.csv", "data.train"),
        ("evaluators=[./no/such/judge]", "no/such/judge"),
    ):
        assert told in run(["check", str(tmp_path / "c.yaml"), "--set", change], capsys)


def main_ends(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_what_a_run_goes_on_with(
    tiny_policy_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with other prompts, beside another process, or from a broken checkpoint; more steps are written down."""
    config = tiny_config(tmp_path, tiny_policy_dir, train={"checkpoint_every": 1})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    main_ends(["train", str(tmp_path / "c.yaml")], 0)
    resume = ["train", "--resume", str(tmp_path / "run"), "--set", "train.steps=3"]
    capsys.readouterr()
    kept = (tmp_path / "prompts.jsonl").read_text()
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS[:3])
    assert "data.train" in run(resume, capsys)
    (tmp_path / "prompts.jsonl").write_text(kept)
    assert "has done 2" in run([*resume[:-1], "train.steps=1"], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="began with 1 processes, and these are 2"):
        check_same(RunFolder(tmp_path / "run"), {})
    monkeypatch.delenv("WORLD_SIZE")
    with RunFolder(tmp_path / "run").locked():
        assert "another process" in run(resume, capsys)
    weights = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"")
    assert "checkpoint-2" in run(resume, capsys)
    weights.write_bytes(whole)
    main_ends(resume, 0)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["steps"] == 3


def test_resume_of_what_is_no_run(tmp_path: Path, capsys: Any) -> None:
    assert str(tmp_path) in run(["train", "--resume", str(tmp_path)], capsys)


def test_resume_keeps_the_run_what_it_was(tiny_policy_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path, tiny_policy_dir)))
    assert "train.learning_rate" in run(["train", "--resume", str(tmp_path), "--set", "train.learning_rate=1"], capsys)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"labels": ["good", "bad"]}, "target is 'YES', expected good or bad"),
        ({"labels": ["good"], "target": "good"}, "two or more different words"),
        ({"labels": ["good", "GOOD"], "target": "good"}, "two or more different words"),
        ({"labels": ["good", " bad"], "target": "good"}, "two or more different words"),
        ({"labels": ["good", "bad"], "target": "good", "readout": "scale"}, "cannot be read out as a scale"),
        ({"labels": ["good", {}], "target": "good"}, "labels"),
        ({"target": "PERHAPS"}, "target is 'PERHAPS', expected YES or NO"),
    ],
)
def test_answers_to_choose_from(
    question: dict[str, Any], said: str, tiny_policy_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    config = tiny_config(tmp_path, tiny_policy_dir, questions={"q": {"ask": "How is it?", **question}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert said in run(["check", str(tmp_path / "config.yaml")], capsys)


def test_reward_of_two_questions_with_one_name() -> None:
    from rlme import InputError, MetaReward, Question

    with pytest.raises(InputError, match="'a'"):
        MetaReward([Question("Is it?", "a"), Question("Is it not?", "a")])

"""`rlme ask`: numbers by hand, complaints where they are due, files and bad input, the command end to end."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from rlme.ask import Asked, ask, bootstrap, conclusions, correlation, exchanged, most_and_least
from rlme.ask_cli import ask as ask_command
from rlme.candidates import Candidate, group_stds, labelled, read_candidates
from rlme.config import Config
from rlme.errors import InputError
from rlme.judging import Judging, Sample
from rlme.questions import Question
from tests.rule_judge import RuleJudge
from tests.tiny_runs import write_config

WAY = Judging("reply", "yes_no")


def sums(n: int = 12, size: int = 4, seed: int = 0) -> list[list[Candidate]]:
    """Prompts "What is a + b?" with right and wrong answers, the first of each group right and the second wrong."""
    draw, groups = random.Random(seed), []
    for g in range(n):
        a, b = g + 2, g + 3
        answers = [a + b, a + b + 1, *(a + b + draw.choice([0, 1]) for _ in range(size - 2))]
        groups.append([Candidate(Sample(f"What is {a} + {b}?", f"It is {x}."), x == a + b) for x in answers])
    return groups


def is_right(text: str) -> bool:
    a, b, x = (int(v) for v in re.findall(r"\d+", text.split("Question:")[0])[:3])
    return a + b == x


def noisy(seed: int = 0) -> Any:
    draw = random.Random(seed)
    return lambda text: min(0.95, max(0.05, (0.8 if is_right(text) else 0.2) + draw.gauss(0, 0.05)))


def run(*rules: Any, **changes: Any) -> Asked:
    judges = [RuleJudge(rule, name=f"judge{i}", **changes) for i, rule in enumerate(rules)]
    return ask(sums(), [Question("Is it right?", "right")], judges, [WAY])


def test_a_question_with_signal_is_told_from_those_without() -> None:
    asked = run(noisy(), lambda text: 0.7, lambda text: random.Random(len(text)).uniform(0.69, 0.71))
    good, *others = asked.verdicts
    assert good.evaluator == "judge0"
    assert good.complaints == []
    assert good.auroc is not None and good.auroc.value > 0.95
    assert good.within_group_auroc is not None and good.within_group_auroc > 0.95
    for other in others:
        assert any("spread too small" in said for said in other.complaints)
        assert any("answers ignored" in said for said in other.complaints)
    text = conclusions(asked)
    assert "has signal: AUROC" in text[0]
    assert sum(" has none: " in line for line in text) == 2


def test_low_mass_failures_and_the_wrong_way_round_are_said() -> None:
    assert any("mass too low: only 20%" in said for said in run(noisy(), mass=0.2).verdicts[0].complaints)
    failing = run(noisy(), fail_on="What is 2 +").verdicts[0]
    assert failing.failures == {"timeout": 4}
    assert any("4 of 48 judgements failed (timeout)" in said for said in failing.complaints)
    backwards = noisy()
    assert any("wrong way round" in said for said in run(lambda text: 1 - backwards(text)).verdicts[0].complaints)


def test_a_small_probability_that_changes_by_half_is_no_ignored_answer() -> None:
    def faint(text: str) -> float:
        return 0.04 if len(text) % 2 else 0.02

    verdict = run(faint).verdicts[0]
    assert verdict.shift < 0.05 and verdict.score_shift > 0.1
    assert not any("answers ignored" in said for said in verdict.complaints)


def test_chance_is_called_chance() -> None:
    draw = random.Random(5)
    asked = ask(sums(60), [Question("?", "q")], [RuleJudge(lambda text: draw.uniform(0.1, 0.9))], [WAY])
    assert any("cannot tell right from wrong" in said for said in asked.verdicts[0].complaints)
    assert conclusions(asked)[-1].startswith("No question has signal")


def test_numbers_are_means_over_completions_and_groups() -> None:
    groups = [
        [Candidate(Sample("p", "x 0.2")), Candidate(Sample("p", "x 0.6"))],
        [Candidate(Sample("q", "x 0.4")), Candidate(Sample("q", "x 0.4"))],
    ]
    judge = RuleJudge(lambda text: float(re.findall(r"x ([\d.]+)", text)[0]))
    verdict = ask(groups, [Question("?", "q")], [judge], [WAY]).verdicts[0]
    assert verdict.probability == pytest.approx(0.4)
    assert verdict.mass == pytest.approx(0.9)
    assert verdict.spread.value == pytest.approx((math.log(0.6) - math.log(0.2)) / 2 / 2)
    assert verdict.shift == pytest.approx(0.2)  # each answer exchanged with its counterpart: .2 four times
    assert verdict.auroc is None
    assert verdict.completions == 4


def test_one_prompt_is_not_enough_to_know() -> None:
    def told(*completions: str, right: tuple[bool | None, ...]) -> Asked:
        group = [Candidate(Sample("p", c), r) for c, r in zip(completions, right, strict=True)]
        judge = RuleJudge(lambda text: float(re.findall(r"x ([\d.]+)", text)[0]))
        return ask([group], [Question("?", "one"), Question("??", "two")], [judge], [WAY])

    for right, what in (((None, None), "spread within a group 0.549"), ((False, True), "AUROC 1.00")):
        asked = told("x 0.2", "x 0.6", right=right)
        text = conclusions(asked)
        assert f"may have signal: {what}, label mass 90%; from one prompt it cannot be known." in text[0]
        assert not any("has signal" in line or "Best" in line or "nan" in line for line in text)
        assert any(line.startswith("One prompt tells nothing about others") for line in text)
        assert asked.json()["unknown"] == asked.unknown
    assert not any(
        line.startswith("No question has signal") for line in conclusions(told("x 1", "x 1", right=(None,) * 2))
    )


def test_equal_answers_are_not_called_ignored() -> None:
    groups = [[Candidate(Sample(prompt, "same")) for _ in range(3)] for prompt in "abcd"]
    asked = ask(groups, [Question("?", "q")], [RuleJudge(lambda text: 0.7)], [WAY])
    assert exchanged(groups, 8) == []
    text = " ".join(conclusions(asked))
    assert "ignored" not in text and "spread too small" not in text and "No question has signal" not in text
    assert "No prompt has two different answers" in text


def test_exchanged_answers_come_from_another_prompt() -> None:
    groups = sums(5)
    swapped = exchanged(groups, 8)
    assert len(swapped) == 8
    flat = [candidate.sample for group in groups for candidate in group]
    for place, sample in swapped:
        assert sample.prompt == flat[place].prompt
        theirs = next(g for g, group in enumerate(groups) if sample.completion in [c.sample.completion for c in group])
        assert flat[place].prompt != groups[theirs][0].sample.prompt
    assert exchanged(groups[:1], 8) == []


def test_wordings_are_ranked_and_twins_are_named() -> None:
    asked = ask(
        sums(),
        [Question("Right?", "a"), Question("Correct?", "b"), Question("Nonsense?", "c")],
        [RuleJudge(lambda text: 0.5 if "Nonsense" in text else (0.8 if is_right(text) else 0.2))],
        [WAY],
    )
    assert {v.question for v in asked.verdicts[:2]} == {"a", "b"}
    assert asked.verdicts[2].question == "c"
    assert any(r == pytest.approx(1) for _, _, r in asked.correlations)
    assert any("say the same" in line for line in conclusions(asked))
    assert any("interval overlaps" in line for line in conclusions(asked))


def test_a_question_with_its_own_way_is_asked_once_and_own_templates_are_told_apart() -> None:
    judge = RuleJudge(noisy())
    fixed = Question("Right?", "fixed", template="reply", readout="yes_no")
    asked = ask(sums(), [fixed], [judge], [WAY, Judging("paper", "scale")])
    assert [v.name for v in asked.verdicts] == ["fixed (rule, reply/yes_no)"]
    own = [Judging(f"{{{{ question }}}} {{{{ prompt }}}} {{{{ completion }}}}{end}", "yes_no") for end in ("", "?")]
    asked = ask(sums(), [Question("Right?", "q")], [judge], own)
    assert {v.template for v in asked.verdicts} == {"own", "own 2"}


def test_labels_of_one_kind_are_said_and_answers_without_one_do_not_count() -> None:
    wrong = [[Candidate(c.sample, False) for c in group] for group in sums(4)]
    asked = ask(wrong, [Question("?", "q")], [RuleJudge(noisy())], [WAY])
    assert asked.verdicts[0].auroc is None
    assert any(line.startswith("All 16 labelled answers are wrong") for line in conclusions(asked))
    some = [*sums(), [Candidate(Sample("What is 1 + 1?", "It is 2."))]]
    asked = ask(some, [Question("?", "q")], [RuleJudge(noisy())], [WAY])
    assert asked.verdicts[0].auroc is not None
    assert asked.verdicts[0].auroc.value > 0.95


def test_spreads_of_different_read_outs_are_not_ranked_against_each_other() -> None:
    unlabelled = [[Candidate(c.sample) for c in group] for group in sums()]
    judges = [RuleJudge(noisy(), name="one"), RuleJudge(noisy(1), name="two")]
    asked = ask(unlabelled, [Question("?", "q")], judges, [WAY, Judging("reply", "marker")])
    best = [line for line in conclusions(asked) if line.startswith("Best read out as ")]
    assert {line.split()[4] for line in best} == {"yes_no", "marker"}


def test_most_and_least_liked_are_the_ends_of_the_widest_groups() -> None:
    asked = run(noisy())
    assert len(asked.liked) == 3
    for pair in asked.liked:
        assert pair["most"]["right"] and not pair["least"]["right"]
        assert pair["most"]["score"] > pair["least"]["score"]
    assert most_and_least([], [], 3) == []


def test_small_statistics() -> None:
    assert correlation([(1, 2), (2, 4), (3, 6)]) == pytest.approx(1)
    assert correlation([(1, 2), (1, 4), (1, 6)]) is None
    assert correlation([(1, 2)]) is None
    assert group_stds([[1, 3], [None, 2], [5], []]) == [1.0]
    interval = bootstrap([0.0, 1.0] * 50)
    assert interval.value == 0.5
    assert 0.38 < interval.low < 0.42 < 0.58 < interval.high < 0.62
    assert math.isnan(bootstrap([]).value)
    assert not labelled([[Candidate(Sample("p", "c"), None)]])
    assert not labelled([[Candidate(Sample("p", "c"), True)]])


def config(**data: Any) -> Config:
    return Config.model_validate(
        {"model": "m", "data": {"train": "x.jsonl", "prompt": "question", **data}, "questions": {"q": "Right?"}}
    )


def rows(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_files_are_grouped_by_prompt_and_labels_stay_hidden(tmp_path: Path) -> None:
    source = rows(
        tmp_path,
        {"question": "1 + 1?", "text": "2", "ok": True, "topic": "sums"},
        {"question": "2 + 2?", "text": "5", "ok": 0, "topic": "sums"},
        {"question": "1 + 1?", "text": "3", "ok": "no", "topic": "sums"},
    )
    groups = read_candidates(config(), source, completion="text", label="ok")
    assert [[c.sample.completion for c in group] for group in groups] == [["2", "3"], ["5"]]
    assert [[c.right for c in group] for group in groups] == [[True, False], [False]]
    for group in groups:
        for candidate in group:
            assert candidate.sample.columns.keys() == {"question", "topic"}
    assert len(read_candidates(config(), source, completion="text", prompts=1)) == 1


def test_gold_labels_completions_and_stays_hidden(tmp_path: Path) -> None:
    source = rows(
        tmp_path,
        {"question": "1 + 1?", "text": "so \\boxed{2}", "answer": "#### 2"},
        {"question": "1 + 1?", "text": "so \\boxed{3}", "answer": "#### 2"},
    )
    (group,) = read_candidates(config(answer="answer"), source, completion="text")
    assert [c.right for c in group] == [True, False]
    assert [c.sample.answer for c in group] == ["2", "3"]
    assert all("answer" not in c.sample.columns for c in group)


def test_completions_without_a_known_answer_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    source = rows(tmp_path, {"question": "1 + 1?", "text": "2"}, {"question": "2 + 2?", "text": "4"})
    assert [c.right for g in read_candidates(config(answer="answer"), source, completion="text") for c in g] == [
        None
    ] * 2
    source = rows(
        tmp_path,
        {"question": "1 + 1?", "text": "2", "answer": "2"},
        {"question": "2 + 2?", "text": "4", "answer": None},
    )
    groups = read_candidates(config(answer="answer"), source, completion="text")
    assert [c.right for g in groups for c in g] == [True, None]
    assert all("answer" not in c.sample.columns for g in groups for c in g)


@pytest.mark.parametrize(
    "record, label, message",
    [
        ({"question": "q", "text": "t", "ok": "maybe"}, "ok", r"row 1: column 'ok' is 'maybe', expected true/false"),
        ({"question": "q", "text": "t", "ok": None}, "ok", "column 'ok' is None"),
        ({"question": "q", "text": 3, "ok": 1}, "ok", "row 1: column 'text' is 3, expected a text"),
        ({"question": "q", "text": "t"}, "ok", "has no column 'ok'; its columns: question, text"),
        ({"question": "q", "words": "t"}, None, "has no column 'text'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, record: dict[str, Any], label: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_candidates(config(), rows(tmp_path, record), completion="text", label=label)


def invoke(*arguments: str) -> Any:
    app = Typer()
    app.command()(ask_command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


def test_the_command_samples_asks_and_writes(tmp_path: Path, tiny_policy_dir: Path) -> None:
    path = write_config(tmp_path, tiny_policy_dir)
    out = tmp_path / "ask.json"
    result = invoke(
        str(path), "--prompts", "3", "--samples", "2", "--template", "reply", "--template", "chat",
        "--readout", "yes_no", "--ask", "Is it about {{ topic }}?", "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 answers to 3 prompts" in result.output
    assert "correlation of the scores" in result.output
    content = json.loads(out.read_text())
    assert len(content["verdicts"]) == 2 * 3  # templates x questions
    assert {v["question"] for v in content["verdicts"]} == {"correct", "brief", "Is it about {{ topic }}?"}
    assert all(v["failures"] == {} for v in content["verdicts"])


def test_the_command_reads_a_file_and_shows_hostile_text_as_text(tmp_path: Path, tiny_policy_dir: Path) -> None:
    path = write_config(tmp_path, tiny_policy_dir)
    source = rows(
        tmp_path,
        {"question": "1 + 1?", "answer": "#### 2", "text": "\x1b[31m[red]2[/red] [/]", "topic": "x"},
        {"question": "1 + 1?", "answer": "#### 2", "text": "a much longer answer: 3", "topic": "x"},
        {"question": "2 + 2?", "answer": "#### 4", "text": "4", "topic": "x"},
        {"question": "2 + 2?", "answer": "#### 4", "text": "5", "topic": "x"},
    )
    result = invoke(str(path), "--data", source, "--completion", "text")
    assert result.exit_code == 0, result.output
    header = next(line for line in result.output.splitlines() if "p(target)" in line).split()
    assert header == ["question", "p(target)", "spread", "moves", "AUROC", "in", "group", "tokens"]
    row = next(line for line in result.output.splitlines() if line.startswith(" correct "))
    assert "…" not in row and len(row.split()) == 7  # nothing is cut off in 80 columns
    assert "[red]2[/red] [/]" in result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--label", "ok"], "--label names a column of --data"),
        (["--set", "model=nothing-here", "--json", "/proc/x.json"], "'/proc/x.json' cannot be written"),
        (["--template", "papr"], "--template 'papr' is unknown: expected auto, paper"),
        (["--readout", "letters"], "--readout 'letters' is unknown"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
        (["--ask", "Is it about {{ tpic }}?", "--prompts", "1", "--samples", "2"], "topic"),
    ],
)
def test_bad_arguments_end_in_a_sentence(
    tmp_path: Path, tiny_policy_dir: Path, arguments: list[str], message: str
) -> None:
    result = invoke(str(write_config(tmp_path, tiny_policy_dir)), *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_no_question_at_all(tmp_path: Path, tiny_policy_dir: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(tiny_policy_dir),
                "data": {"train": str(write_config(tmp_path, tiny_policy_dir).parent / "prompts.jsonl"),
                         "prompt": "question", "answer": "answer"},
                "reward": "rlvr",
                "evaluators": [],
            }
        )
    )  # fmt: skip
    result = invoke(str(path))
    assert isinstance(result.exception, InputError)
    assert "there is no question" in str(result.exception)


def test_a_negative_weight_wants_the_wrong_ones_high() -> None:
    wrong = noisy()
    asked = ask(sums(), [Question("Is it wrong?", "wrong", weight=-1.0)],
                [RuleJudge(lambda text: 1 - wrong(text))], [WAY])  # fmt: skip
    (verdict,) = asked.verdicts
    assert verdict.auroc is not None and verdict.auroc.value > 0.95
    assert not any("wrong way round" in said for said in verdict.complaints)


def test_chat_prompts_need_no_judge_that_is_the_policy(tmp_path: Path, tiny_policy_dir: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    source = rows(tmp_path, {"question": turns, "text": "2"}, {"question": turns, "text": "3"})
    settings = config().model_copy(update={"model": Config.model_validate(
        {"model": str(tiny_policy_dir), "data": "x.jsonl", "questions": {"q": "Right?"}}
    ).model})  # fmt: skip
    (group,) = read_candidates(settings, source, completion="text")
    assert len(group) == 2 and group[0].sample.prompt == tuple(turns)
    assert "<|im_start|>system" in group[0].sample.context and group[0].sample.n_tokens > 0

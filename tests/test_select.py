"""`rlme select`: each way to choose by hand, order effects, abstention, metrics against scikit-learn, the command."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from rlme.ask_cli import select as select_command
from rlme.candidates import Candidate
from rlme.errors import InputError
from rlme.judging import Judging, Sample
from rlme.questions import Question
from rlme.select import (
    Chosen,
    calibration_auc,
    choice_probabilities,
    choose,
    coverage_curve,
    evaluate,
    sentences,
    threshold_for,
    write_chosen,
)
from tests.rule_judge import RuleJudge
from tests.tiny_runs import write_config

WAY = Judging("reply", "yes_no")
QUESTION = [Question("Is it right?", "right")]


def number(text: str) -> float:
    return float(re.findall(r"= ([\d.]+)", text)[0])


def group(*values: float, right: int | None = None, answers: list[str] | None = None) -> list[Candidate]:
    return [
        Candidate(
            Sample("What?", f"x = {v}", answer=answers[i] if answers else None), None if right is None else i == right
        )
        for i, v in enumerate(values)
    ]


def ways(groups: list[list[Candidate]], judge: RuleJudge) -> dict[str, Chosen]:
    return {way.name: way for way in choose(groups, QUESTION, [judge], [1.0], WAY)}


def test_each_way_chooses_and_trusts_as_it_says() -> None:
    judge = RuleJudge(number, quality=lambda answer: 3.0 if answer.startswith("None") else 10 * (1 - number(answer)))
    found = ways([group(0.2, 0.9, 0.6, answers=["7", "8", "7"])], judge)
    letters = [8.0, 1.0, 4.0, 3.0]
    assert found["first"].choices == [(0, 0.0)]
    assert found["vote"].choices == [(0, pytest.approx(2 / 3))]
    assert found["eval"].choices == [(1, pytest.approx(0.9))]
    assert found["select"].choices == [(0, pytest.approx(8 / 13))]
    assert found["hybrid"].choices == [(0, pytest.approx(0.2))]
    assert found["hybrid, none"].choices == [(0, pytest.approx(0.2 - 3 / sum(letters)))]
    assert found["reward"].choices[0] == (1, pytest.approx(-0.10536, abs=1e-4))


def test_a_liking_for_the_first_letter_does_not_decide() -> None:
    judge = RuleJudge(number, quality=lambda answer: 1.0, first_letter_bonus=5.0)
    (p,) = choice_probabilities([group(0.1, 0.2)], judge)
    assert p is not None
    assert p[0] == pytest.approx(p[1])
    fair = RuleJudge(number, quality=lambda answer: 2.0 if "0.2" in answer else 1.0, first_letter_bonus=1.5)
    (p,) = choice_probabilities([group(0.1, 0.2)], fair)
    assert p is not None and p[1] > p[0]


def test_a_failed_judgement_is_no_number() -> None:
    judge = RuleJudge(number, fail_on="x = 0.9")
    found = ways([group(0.2, 0.9), group(0.3, 0.4)], judge)
    assert found["eval"].choices[0] == (0, pytest.approx(0.2))  # the failed one is out
    assert found["select"].choices[0] is None  # all letters are in one prompt
    assert found["hybrid"].choices[0] is None
    report = evaluate([group(0.2, 0.9, right=0), group(0.3, 0.4, right=0)], list(found.values()))
    assert next(m for m in report.methods if m.name == "select").missing == 1
    assert "select: 1 prompts could not be judged" in sentences(report)[-1]
    nothing = ways([group(0.9)], RuleJudge(number, fail_on="x"))
    assert nothing["reward"].choices == [None]


pairs = st.lists(st.tuples(st.integers(0, 5).map(float), st.booleans()), min_size=1, max_size=30)


@settings(deadline=None)
@given(pairs)
def test_metrics_match_their_definitions(drawn: list[tuple[float, bool]]) -> None:
    from sklearn.metrics import roc_auc_score

    labels = [ok for _, ok in drawn]
    if len(set(labels)) == 2:
        assert calibration_auc(drawn) == pytest.approx(roc_auc_score(labels, [s for s, _ in drawn]))
    else:
        assert calibration_auc(drawn) is None
    curve = coverage_curve(drawn)
    assert [c for c, _ in curve] == pytest.approx([k / len(drawn) for k in range(1, len(drawn) + 1)])
    assert curve[-1][1] == pytest.approx(sum(labels) / len(labels))
    assert curve == coverage_curve(drawn[::-1])  # the order of equally trusted ones does not matter
    for wanted in (0.5, 0.8):
        threshold = threshold_for(drawn, wanted)
        shares = {t: [ok for s, ok in drawn if s >= t] for t, _ in drawn}
        fit = [t for t, kept in shares.items() if sum(kept) / len(kept) >= wanted]
        assert threshold == (min(fit) if fit else None)


def labelled_groups(n: int = 200, seed: int = 0) -> list[list[Candidate]]:
    """Answers trusted by how likely they are right: the first is right with the probability it shows."""
    draw, groups = random.Random(seed), []
    for _ in range(n):
        p = draw.random()
        groups.append(group(p, p / 3, right=0 if draw.random() < p else 1))
    return groups


def test_a_threshold_keeps_what_it_promises_on_unseen_prompts() -> None:
    groups = labelled_groups(600)
    report = evaluate(groups, list(ways(groups, RuleJudge(number)).values()), accuracy=0.8)
    best = next(m for m in report.methods if m.name == "eval")
    assert best.threshold is not None and 0.45 < best.threshold < 0.75
    assert best.kept_accuracy == pytest.approx(0.8, abs=0.07)
    assert best.coverage is not None and 0.25 < best.coverage < 0.6
    assert best.calibration_auc is not None and best.calibration_auc > 0.75
    assert best.selective_auc is not None and best.selective_auc > best.accuracy.value
    assert report.single is not None and report.possible == 1
    assert any("For 80% abstain below" in line for line in sentences(report))


def test_a_threshold_that_does_not_exist_is_said(tmp_path: Path) -> None:
    groups = [group(0.9, 0.1, right=1) for _ in range(10)] + [group(0.8, 0.1, right=1)]
    report = evaluate(groups, list(ways(groups, RuleJudge(number)).values()), accuracy=0.9)
    assert all(m.threshold is None for m in report.methods)
    assert any("No threshold reaches 90%" in line for line in sentences(report))
    write_chosen(groups, list(ways(groups, RuleJudge(number)).values()), report, tmp_path / "out.jsonl")
    assert all(json.loads(line)["abstain"] for line in (tmp_path / "out.jsonl").read_text().splitlines())


def test_failed_judgements_are_said() -> None:
    groups = [group(0.2, 0.9), group(0.3, 0.8)]
    way = ways(groups, RuleJudge(number, fail_on="0.9"))["reward"]
    assert way.failures == {"timeout": 1}
    report = evaluate(groups, [way])
    report.failures = way.failures
    assert sentences(report)[-1] == "1 judgements failed (timeout x1)."


def test_without_labels_nothing_is_measured(tmp_path: Path) -> None:
    groups = [group(0.2, 0.9)]
    chosen = list(ways(groups, RuleJudge(number)).values())
    report = evaluate(groups, chosen)
    assert report.methods == [] and report.single is None
    assert "nothing is measured" in sentences(report)[0]
    with pytest.raises(InputError, match="--accuracy needs to know"):
        evaluate(groups, chosen, accuracy=0.9)
    write_chosen(groups, chosen, report, tmp_path / "out.jsonl")
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert (line["completion"], line["chosen_by"], line["abstain"]) == ("x = 0.9", "reward", False)


def test_chosen_answers_are_written_with_abstention(tmp_path: Path) -> None:
    groups = labelled_groups(100)
    chosen = list(ways(groups, RuleJudge(number)).values())
    report = evaluate(groups, chosen, accuracy=0.8)
    write_chosen(groups, chosen, report, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    threshold = report.methods[0].threshold
    assert threshold is not None
    assert [line["abstain"] for line in lines] == [line["trust"] < threshold for line in lines]


def test_the_best_way_is_right_most_often_and_selective_auc_only_breaks_ties() -> None:
    groups = [group(0.9 - i / 100, 0.1, right=1) for i in range(4)] + [group(0.8, 0.2, right=0)]
    always, lone = [(1, 0.5)] * 4 + [(0, 0.5)], [(1, 0.7), None, None, None, None]
    surer = [(1, 0.9), (1, 0.8), (0, 0.1), (1, 0.7), (0, 0.6)]
    chosen = [
        Chosen("worse", "", [(0, 0.1 * i) for i in range(5)]),
        Chosen("lone", "", lone),
        Chosen("none", "", [None] * 5),
        Chosen("unsure", "", [(c, 1 - t) for c, t in surer]),
        Chosen("surer", "", surer),
        Chosen("always", "", always),
    ]
    report = evaluate(groups, chosen, accuracy=0.9)
    assert [m.name for m in report.methods] == ["always", "surer", "unsure", "worse", "lone", "none"]
    assert report.methods[0].selective_auc is None
    assert (report.methods[0].coverage, report.methods[0].kept_accuracy) == (1, 1)  # trust is constant, not missing
    assert "Best is always: right in 100.0%." in sentences(report)


def test_prompts_that_could_not_be_judged_are_abstentions() -> None:
    groups = [group(0.9, 0.1, right=i % 2) for i in range(10)]  # right: the first answer to every other prompt
    two = [(0, 0.9), None, (0, 0.8), *[None] * 7]
    eight = [(0, 0.9 - i / 100) if i < 8 else None for i in range(10)]
    report = evaluate(groups, [Chosen("two", "", two), Chosen("eight", "", eight)])
    methods = {m.name: m for m in report.methods}
    assert methods["two"].curve == [(0.1, 1.0), (0.2, 1.0)] and methods["two"].missing == 8
    assert methods["two"].selective_auc == pytest.approx(0.2)
    assert methods["two"].at_half is None
    assert methods["eight"].curve[-1] == (0.8, 0.5)
    assert methods["eight"].at_half == pytest.approx(0.6)  # 3 of the 5 most trusted


@pytest.mark.parametrize(
    "labels, why",
    [
        ([False, False], "all 2 answers are wrong"),
        ([True, True], "all 2 answers are right"),
        ([True, None], "of 1 of the 2 answers it is not known whether they are right"),
        ([None, None], "it is not known which answers are right"),
    ],
)
def test_why_nothing_is_measured_is_said(labels: list[bool | None], why: str) -> None:
    groups = [[Candidate(Sample("What?", "x"), right) for right in labels]]
    report = evaluate(groups, [])
    assert f"2 answers each; {why}" in sentences(report)[0]
    assert "--label" not in sentences(report)[0] or labels == [None, None]
    with pytest.raises(InputError, match=f"--accuracy needs to know .*{why}"):
        evaluate(groups, [], accuracy=0.5)


def test_too_many_answers_and_no_question() -> None:
    with pytest.raises(InputError, match="at most 25"):
        choose([group(*[0.5] * 26)], QUESTION, [RuleJudge()], [1.0], WAY)
    with pytest.raises(InputError, match="at least one question"):
        choose([group(0.5)], [], [RuleJudge()], [1.0], WAY)


def test_the_command_end_to_end(tmp_path: Path, tiny_policy_dir: Path) -> None:
    app = Typer()
    app.command()(select_command)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})

    path = write_config(tmp_path, tiny_policy_dir)
    source = tmp_path / "answers.jsonl"
    source.write_text(
        "".join(
            json.dumps({"question": f"{a} + 1?", "answer": "x", "topic": "t", "text": str(a + d), "ok": d == 1}) + "\n"
            for a in range(6)
            for d in range(3)
        )
    )
    result = invoke(
        str(path), "--data", str(source), "--completion", "text", "--label", "ok", "--accuracy", "0.5",
        "--json", str(tmp_path / "t.json"), "--output", str(tmp_path / "o.jsonl"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "hybrid, none" in result.output and "…" not in result.output  # nothing is cut off in 80 columns
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["single"] == pytest.approx(1 / 3) and content["possible"] == 1
    assert {m["name"] for m in content["methods"]} == {
        "first", "vote", "eval", "select", "hybrid", "hybrid, none", "reward",
    }  # fmt: skip
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 6
    sampled = invoke(str(path), "--prompts", "2", "--samples", "2")
    assert sampled.exit_code == 0, sampled.output
    assert "all 4 answers are wrong" in " ".join(sampled.output.split())  # data.answer is known
    for option in ("--output", "--json"):
        refused = invoke(str(path), "--set", "model=nothing-here", option, str(source / "file-is-no-folder"))
        assert isinstance(refused.exception, InputError) and "cannot be written" in str(refused.exception)


def test_a_negative_weight_wants_the_least() -> None:
    question = [Question("Is it long-winded?", "long", weight=-1.0)]
    found = {way.name: way for way in choose([group(0.2, 0.9)], question, [RuleJudge(number)], [1.0], WAY)}
    assert found["eval"].choices == [(0, pytest.approx(0.8))] and found["reward"].choices[0][0] == 0

"""The lab: world, corpus, tokenizer, and the experiments as configurations."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rlme.config import Config
from rlme.errors import InputError
from rlme.judging import Sample
from rlme.lab import corpus
from rlme.lab.chart import Line, Panel, _ticks, chart
from rlme.lab.data import write_data
from rlme.lab.experiments import EXPERIMENTS, configuration
from rlme.lab.results import smoothed
from rlme.lab.run import find
from rlme.lab.tokenizer import UNK, build_tokenizer, encode, vocabulary
from rlme.lab.world import FAMILIES, INVENTED, MOVES, Problem, define, draw_problem, draw_solution, taught
from rlme.templating import render


def test_every_move_is_a_bijection_and_has_a_name_in_two_families() -> None:
    for move in MOVES:
        assert sorted(taught(move, d) for d in range(10)) == list(range(10))
        assert [taught(move, d) for d in range(10)] != list(range(10))
    for table in set(MOVES.values()):
        assert sum(table in family.values() for family in FAMILIES.values()) == 2


def test_solutions_are_what_they_say() -> None:
    """Steps and answer read back from the text agree with the flags."""
    rng = random.Random(0)
    correct = []
    for _ in range(1500):
        problem = draw_problem(rng)
        if rng.random() < 0.3:
            problem = define(rng, problem, rng.choice(("invented", "same", "against")))
        solution = draw_solution(rng, problem)
        boxed = re.search(r"\\boxed\{(\d)\}", solution.text)
        assert (boxed is None) == (solution.answer is None)
        assert solution.correct == (boxed is not None and int(boxed[1]) == problem.answer)
        steps = re.findall(r"(?=(\d) (\w+) (\d))", solution.text)
        if steps:
            follows = [
                int(a) == e for (a, _, _), e in zip(steps, [problem.start, *(int(s[2]) for s in steps)], strict=False)
            ]
            due = [m == p for (_, m, _), p in zip(steps, [*problem.moves, ""], strict=False)]
            right = [
                ok and in_place and problem.step(m, int(a)) == int(b)
                for (a, m, b), ok, in_place in zip(steps, follows, due, strict=True)
            ]
            complete = [m for _, m, _ in steps] == list(problem.moves)
            assert [flag for _, flag in solution.pieces if flag is not None] == right
            assert solution.sound == (complete and all(right) and solution.answer == int(steps[-1][2]))
        correct.append(solution.correct)
    assert 0.2 < sum(correct) / len(correct) < 0.4


def test_a_definition_in_the_text_counts() -> None:
    problem = Problem(4, ("mirror", "turn"), ("mirror", "hop"))
    assert problem.answer == taught("turn", taught("hop", 4))
    assert problem.text == "Here mirror means hop. Start at 4: mirror, turn. Where does it stop?"
    rng = random.Random(1)
    for kind in ("invented", "same", "against"):
        for _ in range(50):
            before = draw_problem(rng)
            after = define(rng, before, kind)
            assert after.definition is not None
            name, meaning = after.definition
            assert name in after.moves
            if kind == "invented":
                assert name in INVENTED
            else:
                assert (MOVES[name] == MOVES[meaning]) == (kind == "same")


def test_tokens_give_back_the_text() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(2)
    for _ in range(200):
        for parts in (
            corpus.draw_document(rng, corpus.Mixture(), corpus.Weights()),
            corpus.draw_drill(rng, corpus.Drills(), corpus.Weights()),
            corpus.draw_drill(rng, corpus.Drills(defined=0.8, kinds=("against",), claims=0.5), corpus.Weights()),
        ):
            text = "".join(part.text for part in parts)
            ids = [i for part in parts for i in encode(part.text)]
            assert ids == encode(text) == tokenizer(text)["input_ids"]
            assert UNK not in ids
            assert tokenizer.decode(ids) == text
    known = vocabulary()
    assert all(f" {n}" in known for n in range(401))
    assert tokenizer("øYESø")["input_ids"] == [known["ø"], known["YES"], known["ø"]]


def test_a_run_asks_as_the_corpus_taught() -> None:
    """The evaluation template writes the corpus' evaluation block, character for character."""
    rng = random.Random(3)
    for _ in range(100):
        problem = draw_problem(rng)
        solution = draw_solution(rng, problem)
        for anchor in (None, problem.answer):
            sample = Sample(
                corpus.problem_block(problem),
                solution.text,
                answer="" if solution.answer is None else str(solution.answer),
                anchor=None if anchor is None else str(anchor),
            )
            asked = render(
                corpus.TEMPLATE, sample.variables() | {"question": corpus.CORRECT, "previous": []}, where="the template"
            )
            block = corpus.problem_block(problem) + solution.text + corpus.evaluation_head(solution, anchor)
            assert asked + " ø" == f"{block}{corpus.CORRECT}\nResponse: ø"


def test_prompt_files_hold_out_what_they_say(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = {f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in tmp_path.glob("*.jsonl")}
    for name in ("plain", "hinted", "reading"):
        held_out = {re.sub(r" \(.*", "", r["problem"]) for r in rows[f"{name}-eval"]}
        assert not held_out & {re.sub(r" \(.*", "", r["problem"]) for r in rows[f"{name}-train"]}
    claimed = [re.search(r"answer is (\d)", r["problem"]) for r in rows["hinted-train"]]
    assert all(c is not None and c[1] == r["answer"] for c, r in zip(claimed, rows["hinted-train"], strict=True))
    claimed = [re.search(r"answer is (\d)", r["problem"]) for r in rows["hinted-eval"]]
    assert all(c is not None and c[1] != r["answer"] for c, r in zip(claimed, rows["hinted-eval"], strict=True))
    write_data(tmp_path / "again")
    assert (tmp_path / "plain-train.jsonl").read_bytes() == (tmp_path / "again" / "plain-train.jsonl").read_bytes()


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=list(EXPERIMENTS))
def test_every_arm_is_a_valid_configuration(experiment: Any, tmp_path: Path) -> None:
    for arm in experiment.arms:
        config = Config.model_validate(configuration(experiment, arm, 1, tmp_path, tmp_path / "run"))
        assert config.train.seed == 1
        gold = config.reward.mode != "rlme" or config.reward.anchor > 0
        assert gold == any(word in arm.label for word in ("RLVR", "GT")), "no label reaches a run of RLME alone"


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(InputError, match=r"no experiment 'fig22' \(did you mean 'fig2'\?\)"):
        find("fig22")


def test_a_chart_is_one_picture() -> None:
    from xml.etree import ElementTree

    bands = Panel("a < b", [Line("x", [1, 2], [0.1, 0.9], [0.0, 0.8], [0.2, 1.0])])
    dots = Panel("dots", [Line("y", [31, 47], [0.7, 0.9], dots=True)], y_range=None, x_range=(30, 50))
    drawn = ElementTree.fromstring(chart([bands, Panel("none", []), dots, bands]))
    assert drawn.tag.endswith("svg")
    assert len([e for e in drawn.iter() if e.tag.endswith("circle")]) == 2
    assert _ticks(31.2, 70.9) == [30, 40, 50, 60, 70, 80]
    assert _ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert smoothed([1.0, 0.0]) == [1.0, 0.9]

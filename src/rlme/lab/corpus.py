"""The corpus of the lab's base models: problem, solution, evaluation, with YES/NO answers to several questions.

A document is a list of parts (text, weight in the loss). The words of the evaluation are those that `experiments.py`
asks with, so that the questions of a run are the ones the model was taught to answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlme.lab.world import (
    DIGITS,
    Problem,
    Solution,
    define,
    definition_text,
    draw_practice,
    draw_problem,
    draw_solution,
)

PROBLEM = "---------Problem---------\n"
SOLUTION = "\n---------Solution---------\n"
PRACTICE = "---------Practice---------"
EVALUATION = "\n---------Evaluation---------\n"
LONGEST = 400
"""Lengths above this are written as this."""

CORRECT = "Is the answer correct?"
LENGTH = "Is the length of the solution between {low} and {high} characters?"
LOGICAL = (
    "Does the whole solution logically lead from the question to an answer, "
    "even if it does not match the correct answer?"
)
SUPPORTED = "Is the answer supported by the text, regardless of whether it seems right or wrong?"
ONLY_TEXT = "Does the solution exclusively use information supplied by the text, even if it appears implausible?"

TEMPLATE = (
    "{{ context }}{{ completion }}\n---------Evaluation---------\n"
    "Extracted answer: {{ answer or 'none' }}.{% if anchor is not none %} {{ anchor }} is correct.{% endif %}"
    " Length: {{ [n_chars, 400] | min }} characters.\n"
    "{% for q in previous %}{{ q.question }}\nResponse: {{ q.reply }}\n{% endfor %}"
    "{{ question }}\nResponse:"
)
"""The same block as `evaluation_head` and `ask` write, as the evaluation template of a run."""


@dataclass(frozen=True)
class Weights:
    """Weight in the loss of the parts of a document."""

    problem: float = 0.05
    solution: float = 1.0
    evaluation: float = 0.02
    verdict: float = 5.0
    probe: float = 0.5
    """The linear probe behind each step."""


@dataclass(frozen=True)
class Mixture:
    """What the corpus is made of; the defaults are the base model's."""

    judging_only: float = 0.45
    """Documents whose solution carries no loss: more often right, so that verdicts are balanced, and with more of the
    faults that are no wrong digit."""
    anchored: float = 0.2
    hinted: float = 0.12
    true_hints: float = 0.85
    defined: float = 0.3
    """Problems whose text defines a move."""
    misread: float = 0.3
    """Share of the solutions of `judging_only` documents that follow other moves than the problem's."""
    faults: tuple[float, ...] = (0.0, 0.0, 1.0, 5.0)
    """How often they have other faults (a wrong start, an answer that is not the last digit, none), one rate drawn for
    each, in units of how often the sampled ones have them."""
    guesses: float = 0.0
    """Share of them that are an answer without steps, right one time in ten."""
    alone: float = 0.45
    """Documents with the question about the answer and nothing else."""
    wrong_verdicts: float = 0.01


@dataclass(frozen=True)
class Drills:
    """What is drilled besides the moves themselves."""

    defined: float = 0.5
    """Drills that define a move, in one of these ways."""
    kinds: tuple[str, ...] = ("invented", "same", "against")
    claims: float = 0.0
    """Drills that give a problem's claim about the answer back."""


class Part(NamedTuple):
    """Text of a document, its weight in the loss, and (behind a step) whether it and all steps so far are right."""

    text: str
    weight: float
    right: bool | None = None
    so_far: bool | None = None


def problem_block(problem: Problem) -> str:
    """The policy's prompt."""
    return f"{PROBLEM}{problem.text}{SOLUTION}"


def evaluation_head(solution: Solution, anchor: int | None) -> str:
    """What is said about a solution before the questions."""
    answer = "none" if solution.answer is None else str(solution.answer)
    return EVALUATION + _said(answer, len(solution.text), anchor)


def _said(answer: str, characters: int, anchor: int | None) -> str:
    correct = f" {anchor} is correct." if anchor is not None else ""
    return f"Extracted answer: {answer}.{correct} Length: {min(characters, LONGEST)} characters.\n"


def draw_corpus_problem(rng: random.Random, mixture: Mixture) -> Problem:
    """A problem, perhaps with a definition or a claim about the answer."""
    problem = draw_problem(rng)
    if rng.random() < mixture.defined:
        problem = define(rng, problem, rng.choice(("invented", "same", "against", "against")))
    if rng.random() < mixture.hinted:
        true = rng.random() < mixture.true_hints
        problem = replace(problem, hint=problem.answer if true else (problem.answer + rng.randint(1, 9)) % 10)
    return problem


END = -1.0
"""Weight of the empty part behind a solution that is sampled from: the text ends here."""


def draw_drill(rng: random.Random, drills: Drills, weights: Weights) -> list[Part]:
    """Single steps, for the probe: where the tables of the moves are learned, and to read what one means. Or the
    evaluation of answers whose problem is not there, only the correct one to compare with."""
    if rng.random() < 0.1:
        return [part for _ in range(6) for part in _comparison(rng, weights)]
    if drills.claims and rng.random() < drills.claims:
        problem = replace(draw_problem(rng), hint=rng.choice(DIGITS))
        solution = draw_solution(rng, problem, copies_hint=1.0)
        return [Part(problem_block(problem), 0.0), Part(solution.text, weights.solution)]
    definition = None
    if rng.random() < drills.defined:
        definition = define(rng, draw_problem(rng), rng.choice(drills.kinds)).definition
    parts = [Part(f"{PRACTICE}\n{definition_text(definition) if definition else ''}", 0.0)]
    for step in draw_practice(rng, 20, definition):
        parts.append(Part(f"\n{step.source} {step.move}", 0.0))
        parts.append(Part(f" {step.digit}", weights.solution if step.right else 0.0, step.right))
    return parts


def _comparison(rng: random.Random, weights: Weights) -> list[Part]:
    answer = rng.randrange(10)
    anchor = answer if rng.random() < 0.5 else (answer + rng.randint(1, 9)) % 10
    told = f"{EVALUATION}{_said(str(answer), rng.randint(10, 250), anchor)}{CORRECT}\nResponse: ø"
    return [Part(told, 0.0), Part("YES" if answer == anchor else "NO", weights.verdict), Part("ø", 0.0)]


def draw_document(rng: random.Random, mixture: Mixture, weights: Weights) -> list[Part]:
    """One document."""
    problem = draw_corpus_problem(rng, mixture)
    judging_only = rng.random() < mixture.judging_only
    if judging_only:
        faults, wrong = rng.choice(mixture.faults), rng.choice((0.0, 0.0, 0.1, 0.25))
        solution = draw_solution(
            rng, problem, wrong_digits=wrong, faults=faults, misread=mixture.misread, guesses=mixture.guesses
        )
    else:
        solution = draw_solution(rng, problem)
    parts = [Part(problem_block(problem), weights.problem)]
    so_far = True
    for text, right in solution.pieces:
        so_far = so_far and right is not False
        known = None if right is None else so_far
        parts.append(Part(text, 0.0 if judging_only else weights.solution, right, known))
    parts.append(Part("", END if not judging_only else 0.0))
    anchor = problem.answer if rng.random() < mixture.anchored else None
    told = evaluation_head(solution, anchor)
    for question, truth in _questions(rng, mixture, problem, solution):
        if rng.random() < mixture.wrong_verdicts and anchor is None:
            truth = not truth
        parts.append(Part(f"{told}{question}\nResponse: ø", weights.evaluation))
        parts += [Part("YES" if truth else "NO", weights.verdict), Part("ø", 0.1)]
        told = "\n"
    return parts


def _questions(rng: random.Random, mixture: Mixture, problem: Problem, solution: Solution) -> list[tuple[str, bool]]:
    correct = (CORRECT, solution.correct)
    if rng.random() < mixture.alone:
        return [correct]
    low, high = rng.choice((20, 40)), rng.choice((60, 80, 120, 200))
    if rng.random() < 0.5:
        low, high = 20, 60
    others = [
        (LENGTH.format(low=low, high=high), low <= len(solution.text) <= high),
        (LOGICAL, solution.sound),
    ]
    if problem.definition is not None:
        others += [(SUPPORTED, solution.correct), (ONLY_TEXT, solution.follows_text)] * 2
    chosen = rng.sample(others, rng.choice((1, 2)))
    if rng.random() < 0.5:
        chosen.insert(rng.randrange(len(chosen) + 1), correct)
    return list(dict.fromkeys(chosen))

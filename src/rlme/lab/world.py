"""The lab's world: a dial with ten digits, and moves that each send every digit to another one.

A problem names a start digit and two to four moves ("Start at 4: mirror, turn. Where does it stop?"); a solution
goes from digit to digit. Every move is a bijection, so one wrong digit never cancels, and checking a step is a look-up
in a table of ten entries: small enough for a tiny model to judge what it can also get wrong.
A problem's text may define a move ("Here mirror means hop."), also against what the model was taught.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

# x -> a * x + b (mod 10); each is a bijection and none the identity.
_TABLES = tuple(
    tuple((a * x + b) % 10 for x in range(10))
    for a, b in [(1, 1), (1, 9), (1, 3), (1, 7), (1, 5), (9, 9), (3, 0), (7, 0), (3, 1), (9, 4)]
)

# Four families of moves; every table has two names, in two families, so that a text can say the same in other words.
FAMILIES: dict[str, dict[str, int]] = {
    "wheel": dict(zip(("turn", "spin", "hop", "skip", "mirror"), (0, 1, 2, 3, 5), strict=True)),
    "lift": dict(zip(("climb", "sink", "rise", "drop", "swap"), (6, 7, 8, 9, 4), strict=True)),
    "dance": dict(zip(("bow", "leap", "twirl", "glide", "sway"), (0, 2, 4, 6, 8), strict=True)),
    "kitchen": dict(zip(("stir", "fold", "whisk", "bake", "salt"), (1, 3, 5, 7, 9), strict=True)),
}
MOVES: dict[str, int] = {name: table for family in FAMILIES.values() for name, table in family.items()}
INVENTED = ("blip", "dax", "wug", "zorp")
"""Names that mean nothing by themselves: a text that uses one defines it."""

DIGITS = tuple(range(10))
WRONG_DIGITS = 0.33
"""How often a step of a solution in the corpus has a wrong digit: most sampled solutions are wrong on purpose."""


def taught(name: str, digit: int) -> int:
    """Where a move leads by its taught meaning."""
    return _TABLES[MOVES[name]][digit]


def definition_text(definition: tuple[str, str]) -> str:
    """How a text says what a move means there."""
    return f"Here {definition[0]} means {definition[1]}. "


@dataclass(frozen=True)
class Problem:
    """A start digit, moves, and what the text adds: a definition (name, meaning) and a claim about the answer."""

    start: int
    moves: tuple[str, ...]
    definition: tuple[str, str] | None = None
    hint: int | None = None

    def step(self, move: str, digit: int) -> int:
        """Where a move leads by this problem's text."""
        if self.definition is not None and move == self.definition[0]:
            return taught(self.definition[1], digit)
        return taught(move, digit)

    @cached_property
    def answer(self) -> int:
        """Where the dial stops, by the text."""
        digit = self.start
        for move in self.moves:
            digit = self.step(move, digit)
        return digit

    @property
    def text(self) -> str:
        """As the model reads it."""
        told = definition_text(self.definition) if self.definition else ""
        claim = f" (The correct answer is {self.hint})" if self.hint is not None else ""
        return f"{told}Start at {self.start}: {', '.join(self.moves)}. Where does it stop?{claim}"


def draw_problem(rng: random.Random, *, family: str | None = None, length: int | None = None) -> Problem:
    """A problem of one family, by default any, with two to four different moves."""
    names = list(FAMILIES[family or rng.choice(list(FAMILIES))])
    return Problem(rng.choice(DIGITS), tuple(rng.sample(names, length or rng.randint(2, 4))))


def define(rng: random.Random, problem: Problem, kind: str) -> Problem:
    """The problem with one of its moves defined in the text.

    kind: `invented` (a name without a meaning takes the move's place), `same` (the taught meaning in another family's
    word) or `against` (another meaning than the taught one).
    """
    place = rng.randrange(len(problem.moves))
    name = problem.moves[place]
    moves = problem.moves
    if kind == "invented":
        meaning, name = rng.choice(list(MOVES)), rng.choice(INVENTED)
        moves = (*moves[:place], name, *moves[place + 1 :])
    else:
        same = kind == "same"
        meaning = rng.choice([m for m, t in MOVES.items() if m != name and (t == MOVES[name]) == same])
    return Problem(problem.start, moves, (name, meaning), problem.hint)


@dataclass(frozen=True)
class Solution:
    """A worked solution and what is true of it."""

    pieces: tuple[tuple[str, bool | None], ...]
    """Its text, cut behind the digit of each step; with each step, whether it is right."""
    answer: int | None
    correct: bool
    """Its answer is the problem's."""
    sound: bool = False
    """Every move is there, follows on, is right by the text, and the answer is where the last one ends."""
    follows_text: bool = True
    """No step uses a taught meaning where the text defines another."""

    @property
    def text(self) -> str:
        """As the model writes it."""
        return "".join(piece for piece, _ in self.pieces)


STYLES = {"brief": 0.25, "short": 0.3, "plain": 0.27, "wordy": 0.15, "direct": 0.03}
"""How solutions are written, from terse to wordy; drawn independently of whether they are right."""


@dataclass(frozen=True)
class Step:
    """One move as a solution states it."""

    source: int
    move: str
    digit: int
    right: bool
    """It follows on, its move is the one that is due, and its digit is what the text's move makes of its source."""


def draw_solution(
    rng: random.Random,
    problem: Problem,
    *,
    wrong_digits: float = WRONG_DIGITS,
    faults: float = 1.0,
    misread: float = 0.04,
    guesses: float = 0.0,
    copies_hint: float = 0.35,
) -> Solution:
    """A solution as the corpus has them: mostly wrong, in one of several styles, now and then with a worse fault."""
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    if problem.hint is not None and rng.random() < copies_hint:
        said = rng.choice(("The correct answer is given. ", "The problem says so. ", ""))
        return _unworked(problem, said, problem.hint)
    if guesses and rng.random() < guesses:
        answer = rng.choice(DIGITS)
        return _unworked(problem, rng.choice(("", "The answer is ")), answer)
    if style == "direct":
        answer = problem.answer if rng.random() < 0.3 else _other(rng, problem.answer)
        return _unworked(problem, rng.choice(("", "The answer is ")), answer)
    by_text = rng.random() < 0.5  # where a text defines a move, half of the solutions go by the taught meaning
    steps: list[Step] = []
    follows_text = True
    digit = problem.start
    moves = _misread(rng, problem) if rng.random() < misread else problem.moves
    for i, move in enumerate(moves):
        jumps = i == 0 and rng.random() < 0.03 * faults
        source = _other(rng, digit) if jumps else digit
        due = meant = problem.step(move, source)
        if not by_text and problem.definition is not None and move == problem.definition[0] and move in MOVES:
            meant = taught(move, source)
            follows_text = follows_text and meant == due
        digit = _other(rng, meant) if rng.random() < wrong_digits else meant
        in_place = i < len(problem.moves) and move == problem.moves[i]
        steps.append(Step(source, move, digit, digit == due and in_place and not jumps))
    answer = _other(rng, digit) if rng.random() < 0.03 * faults else digit
    sound = moves == problem.moves and all(s.right for s in steps) and answer == digit
    if rng.random() < 0.01 * faults:  # no answer
        return Solution(_write(style, steps, None), None, False, False, follows_text)
    return Solution(_write(style, steps, answer), answer, answer == problem.answer, sound, follows_text)


def _unworked(problem: Problem, said: str, answer: int) -> Solution:
    """An answer without steps."""
    return Solution(((said + _boxed(answer), None),), answer, answer == problem.answer)


def _misread(rng: random.Random, problem: Problem) -> tuple[str, ...]:
    """The problem's moves with one left out, two exchanged, another one in its place, or one too many."""
    moves = list(problem.moves)
    place = rng.randrange(len(moves))
    kind = rng.choice(("left out", "exchanged", "another", "one more"))
    if kind == "left out":
        del moves[place]
    elif kind == "exchanged":
        moves[place], moves[place - 1] = moves[place - 1], moves[place]
    elif kind == "another":
        family = next((f for f in FAMILIES.values() if any(m in f for m in moves)), FAMILIES["wheel"])
        moves[place] = rng.choice([m for m in family if m != moves[place]])
    if kind == "one more":
        moves.insert(place + 1, rng.choice(list(next((f for f in FAMILIES.values() if moves[place] in f), MOVES))))
    return tuple(moves)


def _other(rng: random.Random, digit: int) -> int:
    return (digit + rng.randint(1, 9)) % 10


def _boxed(answer: int | None) -> str:
    return f"\\boxed{{{answer}}}" if answer is not None else "..."


_FRAMES = {
    "brief": ("", ". "),
    "short": ("Start ", ". Answer "),
    "plain": ("First ", ". The answer is "),
    "wordy": (
        "We begin as told and take one move after the other, each from where the dial stands: ",
        ". So the dial stops there and the final answer to what was asked is ",
    ),
}


def _write(style: str, steps: list[Step], answer: int | None) -> tuple[tuple[str, bool | None], ...]:
    """Every style states a digit, a move, the next digit, the next move ...; what stands around them differs."""
    before, after = _FRAMES[style]
    pieces: list[tuple[str, bool | None]] = []
    for i, s in enumerate(steps):
        pieces.append((f" {s.move} {s.digit}" if i else f"{before}{s.source} {s.move} {s.digit}", s.right))
    return (*pieces, (f"{after}{_boxed(answer)}", None))


def draw_practice(rng: random.Random, count: int, definition: tuple[str, str] | None) -> list[Step]:
    """Single steps, four in ten of them wrong; a move that is defined comes up in every other one."""
    drawn = []
    for _ in range(count):
        move, source, right = rng.choice(list(MOVES)), rng.choice(DIGITS), rng.random() < 0.6
        meaning = move
        if definition is not None and rng.random() < 0.5:
            move, meaning = definition
        digit = taught(meaning, source)
        drawn.append(Step(source, move, digit if right else _other(rng, digit), right))
    return drawn

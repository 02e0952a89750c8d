"""Gold answers: finding the answer in a text and comparing it with the known one.

Used for the verifiable reward (RLVR: 1 if correct, else 0) and for gold metrics that never feed back.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from rlme.errors import InputError
from rlme.math_worker import MathWorker

Compare = Literal["math", "exact"]

METHODS = ("auto", "boxed", "####", "last_number", "text", "regex:PATTERN")

# A sign counts only where it cannot be a minus between two terms, as in "5-3".
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-\u2212]\s?)?[$€£¥]?"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?(?:\s?/\s?\d+(?![\d/.]))?|(?<!\d)\.\d+)"
)


def check_method(method: str) -> str:
    """`method` if it is a way to find an answer, else InputError."""
    if method.startswith("regex:"):
        _pattern(method)
    elif method not in METHODS:
        raise InputError(f"answer extraction {method!r} is unknown; expected {', '.join(METHODS)}.")
    return method


@lru_cache(maxsize=64)
def _pattern(method: str) -> re.Pattern[str]:
    try:
        return re.compile(method.removeprefix("regex:"))
    except re.error as error:
        raise InputError(f"answer extraction {method!r} is no regular expression ({error}).") from None


def extract_answer(text: str, method: str) -> str | None:
    """The answer that `text` ends with, or None when it has none.

    Args:
        text: a completion, or the solution in a data set.
        method: "boxed": the last `\\boxed{...}`, braces nested; "####": the line after the last `####`;
            "last_number"; "regex:PATTERN": the last match, its group `answer` or 1 or all of it;
            "auto": the first of the first three that finds something; "text": all of it.

    Raises:
        InputError: unknown method, or an invalid regular expression.
    """
    if method == "auto":
        return _boxed(text) or _after_hashes(text) or _last_number(text)
    if method == "boxed":
        return _boxed(text)
    if method == "####":
        return _after_hashes(text)
    if method == "last_number":
        return _last_number(text)
    if method == "text":
        return text.strip() or None
    check_method(method)
    last = None
    for last in _pattern(method).finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    found = last["answer"] if "answer" in last.re.groupindex else last[1] if last.re.groups else last[0]
    return (found or "").strip() or None


_BOX = re.compile(r"\\boxed\s*\{")


def _boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` that is closed."""
    begins = {match.end() for match in _BOX.finditer(text)}
    opened: list[int] = []  # where the contents of the braces that are still open begin
    last: tuple[int, int] | None = None
    for brace in re.finditer(r"[{}]", text) if begins else ():
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (begin := opened.pop()) in begins and (last is None or begin > last[0]):
            last = begin, brace.start()
    return text[last[0] : last[1]].strip() or None if last else None


def _after_hashes(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return (rest.strip().split("\n", 1)[0].strip() or None) if mark else None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].strip() if numbers else None


def same_answer(predicted: str | None, gold: str, compare: Compare = "math") -> bool:
    """Whether an extracted answer equals the known one.

    Args:
        predicted: as `extract_answer` gave it; None (no answer found) is never equal.
        gold: the known answer, already extracted.
        compare: both first compare as numbers (commas, currency and a unit on one side ignored). If one is no
            number, "math" asks math-verify whether the expressions are equal, and "exact" compares the texts
            without punctuation, whitespace and case (the rules of the RLME paper, App. A).
    """
    if predicted is None:
        return False
    numeric = _same_number(predicted, gold, percent=compare == "math")
    if numeric is not None:
        return numeric
    if compare == "math" and _MATHEMATICAL.search(gold):
        return _plain_math(predicted) == _plain_math(gold) or _math_equal(predicted, gold)
    return (_plain_text(predicted) or predicted.strip()) == (_plain_text(gold) or gold.strip())


def is_correct(completion: str, gold: str, *, method: str = "auto", compare: Compare = "math") -> bool:
    """Whether the answer found in a completion equals the known one; 100,000 a second for numbers."""
    return same_answer(extract_answer(completion, method), gold, compare)


# -- numbers

_NOISE = re.compile(r"\\[$,!;: ]|\{,\}|[$€£¥]|\\(?:left|right|displaystyle|dfrac)\b|^\s*[=≈]\s*")
# A unit is a word; one letter behind the digits is one only if it is a usual one: "3x" and "2i" are expressions.
_QUANTITY = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d{1,2})?|\.\d+|\d+\s*/\s*\d+)"
    r"\s*(?P<unit>\\?%|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|"
    r"(?:(?<=\s)[^\W\d_]|[^\W\d_]{2}|[ghlmsACFJKLNVW])[^\d+*/=^\\{}()-]*)?\s*\.?"
)
_MAX_NUMBER_LENGTH = 60  # longer ones are not worth exact arithmetic on untrusted text


@lru_cache(maxsize=65536)
def _quantity(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a text that is one number, perhaps with a unit; None for anything else."""
    match = _QUANTITY.fullmatch(_NOISE.sub("", text).strip()) if len(text) <= _MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    try:
        value = Fraction(match["number"].replace(",", "").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None
    return (value if match["sign"] in ("", "+") else -value), _plain_text(match["unit"] or "")


def _same_number(predicted: str, gold: str, *, percent: bool) -> bool | None:
    """None when one of them is no number."""
    first, second = _quantity(predicted), _quantity(gold)
    if first is None or second is None:
        return None
    (a, unit_a), (b, unit_b) = first, second
    if unit_a and unit_b and unit_a != unit_b:  # "5 March" is not "5 April", nor "5 feet" "5 metres"
        return False
    if percent and unit_a != unit_b and "%" in (unit_a, unit_b):
        return a == b or (a / 100 if unit_a == "%" else a) == (b / 100 if unit_b == "%" else b)
    # Six decimals is where math-verify stops comparing; two integers have to be equal.
    return a == b or (a.denominator * b.denominator > 1 and abs(a - b) < Fraction(1, 2_000_000))


# -- texts and expressions

_MATHEMATICAL = re.compile(r"[\d\\^+*/=<>()\[\]{}√π∞]")
_MAX_EXPRESSION_LENGTH = 300
_WORKER = MathWorker()


def _plain_text(text: str) -> str:
    """Without case, whitespace, currency signs and punctuation, but with % and the colon of 12:30."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\b|(?<=\d),(?=\d)", "", text)
    folded = unicodedata.normalize("NFKC", text).casefold()
    between_digits = {match.start() for match in re.finditer(r"(?<=\d)\S(?=\d)", folded)}
    return "".join(c for i, c in enumerate(folded) if c == "%" or i in between_digits or not _ignored(c))


@lru_cache(maxsize=4096)
def _ignored(character: str) -> bool:
    category = unicodedata.category(character)
    return character.isspace() or category.startswith("P") or category == "Sc"


def _plain_math(text: str) -> str:
    return re.sub(r"\s+|\.$", "", _NOISE.sub("", text).replace("$", ""))


@lru_cache(maxsize=65536)
def _math_equal(predicted: str, gold: str) -> bool:
    if max(len(predicted), len(gold)) > _MAX_EXPRESSION_LENGTH:
        return False
    return _WORKER.equal(gold.strip().strip("$"), predicted.strip().strip("$"))

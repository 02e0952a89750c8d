"""Questions, the templates they are asked in, and the read-outs that turn log-probabilities into a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlme.errors import InputError
from rlme.templating import undeclared

MARKER = "ø"  # U+00F8: rare, and one token in most vocabularies (RLME, App. B)

ReadoutName = Literal["auto", "marker", "yes_no", "scale", "reason"]
Kind = Literal["text", "turn", "message"]

RATINGS = ("0", "1", "2", "3", "4")


@dataclass(frozen=True, slots=True)
class Template:
    """An evaluation template: Jinja `text`, and where it goes.

    `text`: the whole context as text to continue. `turn`: the user's next turn after prompt and completion (chat).
    `message`: one user message with everything in it (chat).
    """

    kind: Kind
    text: str

    @property
    def joint(self) -> bool:
        """Whether questions can follow each other in one block."""
        return "previous" in undeclared(self.text)


_ANCHOR = "{% if anchor is not none %}The correct answer is {{ anchor }}.\n{% endif %}"

# The paper's template continues the policy's own text: a header, the rules, what was measured, the question.
PAPER = Template(
    "text",
    "{{ context }}{{ completion }}\n"
    "---------Evaluation---------\n"
    "Judge the solution above. Write {{ reply_format }} and nothing else. "
    "A solution whose answer cannot be found because of its form is wrong.\n"
    "About the solution: {% if answer is not none %}the extracted answer is {{ answer or 'missing' }}; {% endif %}"
    "it has {{ n_chars }} characters.\n" + _ANCHOR + "\n"
    "{% for q in previous %}{{ q.question }}\nResponse: {{ q.reply }}\n\n{% endfor %}"
    "{{ question }}\nResponse:",
)

REPLY = Template(
    "text",
    "Message: {{ prompt }}\n"
    'Reply: "{{ completion | trim }}"\n' + _ANCHOR + "\n"
    "{% for q in previous %}Question: {{ q.question }} ({{ q.reply_format }})\nAnswer: {{ q.reply }}\n\n{% endfor %}"
    "Question: {{ question }} ({{ reply_format }})\n"
    "Answer:",
)

CHAT = Template(
    "turn",
    "Now judge your last message as a strict, impartial examiner. It has {{ n_chars }} characters"
    "{% if answer is not none %} and its extracted answer is {{ answer or 'missing' }}{% endif %}. "
    "{% if anchor is not none %}The correct answer is {{ anchor }}. {% endif %}\n"
    "{{ question }}\n"
    "Answer with {{ reply_format }} and nothing else.",
)

JUDGE = Template(
    "message",
    "Here is a message and a reply to it.\n\n"
    "### Message\n{{ prompt }}\n\n"
    "### Reply\n{{ completion }}\n\n"
    "### Question about the reply\n"
    "{% if anchor is not none %}The correct answer is {{ anchor }}. {% endif %}{{ question }}\n"
    "Answer with {{ reply_format }} and nothing else.",
)

TEMPLATES = {"paper": PAPER, "reply": REPLY, "chat": CHAT, "judge": JUDGE}


def find_template(template: str | Template, *, chat: bool) -> Template:
    """The template called `template` (or the Jinja text it is), for an evaluator asked through chat or by text."""
    if isinstance(template, Template):
        return template
    if template == "auto":
        return CHAT if chat else PAPER
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{{" in template:
        return Template("message" if chat else "text", template)
    raise InputError(
        f"template {template!r} is unknown: expected auto, {', '.join(TEMPLATES)}, or a Jinja text with {{{{ ... }}}}"
    )


@dataclass(frozen=True, slots=True)
class Question:
    """A meta-question q_k: its text, weight w_k, target answer a_k, and (optionally) its own template, read-out, and
    answers to choose from (`labels`, in place of YES and NO; the target is one of them)."""

    ask: str
    name: str = ""
    weight: float = 1.0
    target: str = "YES"
    template: str | Template | None = None
    readout: ReadoutName | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"question {self.name or self.ask!r}"
        labels = tuple(self.labels)
        if labels and (
            len({x.casefold() for x in labels}) < max(2, len(labels)) or any(not x or x.strip() != x for x in labels)
        ):
            raise InputError(
                f"{where}: labels are {list(labels)}, expected two or more different words without outer spaces"
            )
        target = next((x for x in labels or ("YES", "NO") if x.casefold() == self.target.casefold()), None)
        if target is None:
            raise InputError(f"{where}: target is {self.target!r}, expected {either(labels or ('YES', 'NO'))}")
        if not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise InputError(f"{where}: weight is {self.weight!r}, expected a number")
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "target", target)
        if not self.name:
            object.__setattr__(self, "name", self.ask)


@dataclass(frozen=True, slots=True)
class Readout:
    """How an answer becomes a number.

    `labels` maps each label to the spellings whose probabilities are summed. `prefill` is written before the answer.
    """

    name: Literal["marker", "yes_no", "scale"]
    prefill: str
    labels: dict[str, tuple[str, ...]]
    reply_format: str

    def score(self, logprobs: dict[str, float], target: str) -> tuple[float, float]:
        """(score, probability of the target) from the labels' log-probabilities (natural log).

        marker: log p(target), not renormalised (RLME eq. 2-3). yes_no: log of p(target) over the labels' sum.
        scale: expected rating in [0, 4] over the ratings' sum; a target of NO turns the scale around.
        """
        if self.name == "marker":
            return logprobs[target], math.exp(logprobs[target])
        total = log_sum_exp(list(logprobs.values()))
        if self.name == "yes_no":
            score = logprobs[target] - total
            return score, math.exp(score)
        expected = sum(int(label) * math.exp(lp - total) for label, lp in logprobs.items())
        expected = expected if target == "YES" else 4 - expected
        return expected, expected / 4

    def with_labels(self, labels: Sequence[str]) -> Readout:
        """The same read-out of other answers; none: as it is. Not for a scale, whose answers are numbers."""
        if not labels:
            return self
        if self.name == "marker":
            wrapped = [f"{MARKER}{label}{MARKER}" for label in labels]
            return replace(self, labels={label: (label + MARKER,) for label in labels}, reply_format=either(wrapped))
        return replace(self, labels={label: _spellings(label) for label in labels}, reply_format=either(labels))

    def reply(self, target: str) -> str:
        """The full text of a given answer, as it stands in a joint block."""
        if self.name == "scale":
            return RATINGS[-1] if target == "YES" else RATINGS[0]
        return f"{MARKER}{target}{MARKER}" if self.name == "marker" else target


def _spellings(label: str) -> tuple[str, ...]:
    words = (label, label.capitalize(), label.lower())
    return tuple(dict.fromkeys(s for word in words for s in (word, " " + word)))


READOUTS = {
    "marker": Readout(
        "marker",
        MARKER,
        {label: (label + MARKER,) for label in ("YES", "NO")},
        f"{MARKER}YES{MARKER} or {MARKER}NO{MARKER}",
    ),
    "yes_no": Readout("yes_no", "", {label: _spellings(label) for label in ("YES", "NO")}, "Yes or No"),
    "scale": Readout(
        "scale", "", {r: (r, " " + r) for r in RATINGS}, "a whole number from 0 (not at all) to 4 (fully)"
    ),
}


def either(words: Sequence[str]) -> str:
    """a, b or c"""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def log_sum_exp(values: Sequence[float]) -> float:
    """log(sum(exp(values))) in double precision; -inf for nothing."""
    top = max(values, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(sum(math.exp(v - top) for v in values))

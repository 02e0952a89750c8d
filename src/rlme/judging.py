"""The judge stage: completions in, judgements out.

    samples x questions -> requests -> evaluator.logprobs -> read-out -> judgements

The same stage serves training, `rlme ask`, the judge benchmark, best-of-n selection and the reward server.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlme.control_tokens import harmless
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import NEGLIGIBLE, Answer, Failure, Judgement, Message, Request
from rlme.questions import (
    READOUTS,
    TEMPLATES,
    Question,
    Readout,
    ReadoutName,
    Template,
    find_template,
    log_sum_exp,
)
from rlme.templating import check_variables, render, undeclared

# What every template may use besides the data columns.
TEMPLATE_VARIABLES = (
    "prompt", "completion", "context", "answer", "n_chars", "n_words", "n_tokens",
    "question", "reply_format", "anchor", "previous",
)  # fmt: skip
OF_THE_ANSWER = {"completion", "answer", "n_chars", "n_words", "n_tokens"}
UNRECORDED = ("answer", "n_tokens")  # what nothing is known of where an answer is a text alone


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion to be judged.

    `prompt` is text or chat messages; `context` the exact text the policy continued (the rendered chat template, or
    the prompt itself). `answer` is the extracted answer: "" when none was found, None when nothing is extracted.
    `anchor` is the true answer if the evaluator may see it. `columns` are the data columns, never gold.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    context: str = ""
    answer: str | None = None
    n_tokens: int = 0
    anchor: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def prompt_text(self) -> str:
        """The prompt as a person would read it: its text, or the contents of its turns."""
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(m["content"] for m in self.prompt)

    def variables(self) -> dict[str, Any]:
        """What a template sees of this completion."""
        return {
            **self.columns,
            "prompt": self.prompt_text(),
            "completion": self.completion,
            "context": self.context or self.prompt_text(),
            "answer": self.answer,
            "n_chars": len(self.completion),
            "n_words": len(self.completion.split()),
            "n_tokens": self.n_tokens,
            "anchor": self.anchor,
        }


@dataclass(frozen=True, slots=True)
class Judging:
    """How questions are asked.

    `template` and `readout` are for questions that bring none of their own (auto: by how the evaluator is asked, text
    or chat). `joint`: all questions stand in one block, each after the target answers of those before it (RLME, App.
    B). With the read-out `reason` a critique of at most `reason_tokens` tokens comes first, then `reason_then` is read.
    """

    template: str | Template = "auto"
    readout: ReadoutName = "auto"
    joint: bool = False
    reason_tokens: int = 128
    reason_then: ReadoutName = "yes_no"


@dataclass(frozen=True, slots=True)
class _Plan:
    """One question as one evaluator is asked it; `continuations` are the spellings of all labels, flat."""

    question: Question
    template: Template
    readout: Readout
    reason: bool
    spellings: dict[str, tuple[str, ...]]
    continuations: tuple[str, ...]


def plan_questions(evaluator: Evaluator, questions: Sequence[Question], judging: Judging) -> list[_Plan]:
    """Settle template, read-out and label spellings of each question for this evaluator.

    Raises `InputError` when the evaluator cannot write a label, or the template does not fit the mode.
    """
    plans = []
    for question in questions:
        template = find_template(question.template or judging.template, chat=evaluator.chat)
        if template.kind != "text" and not evaluator.chat:
            raise InputError(
                f"question {question.name!r}: its template is for chat, but evaluator {evaluator.name!r} is asked by "
                "text: use a template of kind text (paper, reply), or style: chat"
            )
        name, reason = readout_name(question, judging)
        if name == "auto":
            name = "marker" if template.kind == "text" else "yes_no"
        readout = READOUTS[name].with_labels(question.labels)
        if judging.joint and not template.joint:
            raise InputError(
                f"question {question.name!r}: judging.joint needs a template that shows `previous` questions, "
                "such as paper or reply; this one does not"
            )
        if judging.joint and reason:
            raise InputError(f"question {question.name!r}: the read-out reason cannot be asked jointly")
        # Spellings are settled over all labels at once: one label's spelling must not contain another's.
        kept = set(evaluator.spellings([s for spellings in readout.labels.values() for s in spellings]))
        spellings = {label: tuple(s for s in ss if s in kept) for label, ss in readout.labels.items()}
        if missing := next((label for label, ss in spellings.items() if not ss), None):
            tried = ", ".join(repr(s) for s in readout.labels[missing])
            raise InputError(
                f"evaluator {evaluator.name!r}: its tokenizer cannot spell the label {missing!r} "
                f"(tried {tried}); choose another `readout` or evaluator"
            )
        flat = tuple(s for ss in spellings.values() for s in ss)
        plans.append(_Plan(question, template, readout, reason, spellings, flat))
    return plans


def check_templates(
    questions: Sequence[Question], judging: Judging, columns: Sequence[str], *, absent: Collection[str] = ()
) -> None:
    """Refuse, before anything is computed, a template or question that uses a name which is no column or variable, or
    which is both; or a question with one of the `absent`, variables that nothing is known for here."""
    known = {*TEMPLATE_VARIABLES, *columns}
    refuse_hidden(questions, judging, columns)
    for question in questions:
        where = f"question {question.name!r}"
        check_variables(question.ask, known - {"question", "previous"}, where=where)
        if blank := sorted(undeclared(question.ask) & set(absent)):
            raise InputError(f"{where}: {{{{ {blank[0]} }}}} is not known here, and it would be asked without it")
        readout_name(question, judging)
        for chat in (False, True):
            template = find_template(question.template or judging.template, chat=chat)
            check_variables(template.text, known, where=f"{where}, template")
            shown = undeclared(template.text)
            if "question" not in shown:
                raise InputError(f"{where}, template: it does not show {{{{ question }}}}, so nothing would be asked")
            if template.kind != "turn" and not (shown | undeclared(question.ask)) & OF_THE_ANSWER:
                raise InputError(
                    f"{where}, template: it does not show {{{{ completion }}}} (or {{{{ answer }}}}), so all would be "
                    "judged alike"
                )


def refuse_hidden(questions: Sequence[Question], judging: Judging, columns: Iterable[str]) -> None:
    """Refuse a column that one of our variables hides, where a question or a template of the user's shows that name.

    Columns `prompt` and `question` are common, and nobody means them: the prompt is made of them.
    """
    both = ({"context", "anchor"} | OF_THE_ANSWER) & set(columns)
    for question in questions if both else ():
        for chat in (False, True):
            template = find_template(question.template or judging.template, chat=chat)
            written = undeclared(question.ask) | (
                set() if template in TEMPLATES.values() else undeclared(template.text)
            )
            if hidden := sorted(written & both):
                raise InputError(
                    f"question {question.name!r}: {{{{ {hidden[0]} }}}} is rlme's own variable (docs/evaluators.md), "
                    "and the data have a column of that name, which it hides: rename the column"
                )


def readout_name(question: Question, judging: Judging) -> tuple[ReadoutName, bool]:
    """What a question's answer is read with (auto: not settled yet), and whether a critique comes before it."""
    name = question.readout or judging.readout
    reason = name == "reason"
    if reason:
        name = judging.reason_then
    if question.labels and name == "scale":
        raise InputError(
            f"question {question.name!r}: `labels` cannot be read out as a scale: choose another `readout`"
        )
    return name, reason


def judge(
    samples: Sequence[Sample],
    questions: Sequence[Question],
    evaluators: Sequence[Evaluator],
    judging: Judging | None = None,
) -> list[list[Judgement]]:
    """Ask every evaluator every question about every completion.

    Returns, per sample, J * K judgements: evaluator-major, questions in their order (N lists of J * K).
    All requests to one evaluator go in one call, so that shared prefixes are computed once.
    """
    judging = judging or Judging()
    judgements: list[list[Judgement]] = [[] for _ in samples]
    for evaluator in evaluators:
        for row, verdicts in zip(judgements, _ask(evaluator, samples, questions, judging), strict=True):
            row.extend(verdicts)
    return judgements


def begin(
    sample: Sample, questions: Sequence[Question], evaluators: Sequence[Evaluator], judging: Judging | None = None
) -> None:
    """Start judging one completion with the evaluators that are asked elsewhere, while others are still sampled.

    `judge` follows with the whole batch; its judgements are the same as without.
    """
    judging = judging or Judging()
    for evaluator in evaluators:
        start: Any = getattr(evaluator, "begin", None)
        if start is None:
            continue
        plans = plan_questions(evaluator, questions, judging)
        asked = list(zip(plans, _requests(evaluator, sample, plans, judging.joint), strict=True))
        for reason, tokens in ((False, None), (True, judging.reason_tokens)):
            if now := [r for plan, r in asked if plan.reason is reason and isinstance(r, Request)]:
                start(now, max_tokens=tokens)


def _ask(
    evaluator: Evaluator, samples: Sequence[Sample], questions: Sequence[Question], judging: Judging
) -> list[list[Judgement]]:
    plans = plan_questions(evaluator, questions, judging)
    requests = [request for sample in samples for request in _requests(evaluator, sample, plans, judging.joint)]
    critiques: dict[int, str] = {}
    reasons = [i for i, r in enumerate(requests) if plans[i % len(plans)].reason and isinstance(r, Request)]
    if reasons:
        _reason(evaluator, requests, reasons, plans, judging, critiques)

    made = [(i, r) for i, r in enumerate(requests) if isinstance(r, Request)]
    answers: list[Answer] = [r if isinstance(r, Answer) else Answer(None) for r in requests]
    for (i, _), answer in zip(made, evaluator.logprobs([r for _, r in made]), strict=True):
        answers[i] = answer

    verdicts = [
        read(answer, plans[i % len(plans)], evaluator.name, critiques.get(i)) for i, answer in enumerate(answers)
    ]
    k = len(plans)
    return [verdicts[i * k : (i + 1) * k] for i in range(len(samples))]


def _requests(evaluator: Evaluator, sample: Sample, plans: Sequence[_Plan], joint: bool) -> list[Request | Answer]:
    """One completion's requests, in the order of the plans; an Answer stands for one that could not be made."""
    requests: list[Request | Answer] = []
    variables = sample.variables() | {"completion": harmless(sample.completion, evaluator)}
    if sample.answer is not None:
        variables["answer"] = harmless(sample.answer, evaluator)
    previous: list[dict[str, str]] = []
    for plan in plans:
        try:
            ask = plan.question.ask
            # A question may use the template's variables, e.g. {{ n_chars }} or {{ reference }}.
            if undeclared(ask):
                ask = render(ask, variables, where=f"question {plan.question.name!r}")
            requests.append(_request(sample, plan, ask, variables, previous if joint else []))
            readout = plan.readout
            reply = readout.reply(plan.question.target)
            previous.append({"question": ask, "reply": reply, "reply_format": readout.reply_format})
        except InputError as error:
            requests.append(Answer.failed(Failure.TEMPLATE, str(error)))
    return requests


def _request(
    sample: Sample, plan: _Plan, ask: str, variables: dict[str, Any], previous: list[dict[str, str]]
) -> Request:
    reply_format = "a short critique" if plan.reason else plan.readout.reply_format
    text = render(
        plan.template.text,
        variables | {"question": ask, "previous": list(previous), "reply_format": reply_format},
        where=f"the template of question {plan.question.name!r}",
    )
    prefill = "" if plan.reason else plan.readout.prefill
    if plan.template.kind == "text":
        if prefill and not text.endswith(prefill):
            text += prefill if text[-1:].isspace() else " " + prefill
        return Request(text, plan.continuations)
    turn: Message = {"role": "user", "content": text}
    if plan.template.kind == "message":
        return Request((turn,), plan.continuations, prefill)
    prompt: tuple[Message, ...] = (
        ({"role": "user", "content": sample.prompt},) if isinstance(sample.prompt, str) else tuple(sample.prompt)
    )
    reply: Message = {"role": "assistant", "content": variables["completion"]}
    return Request((*prompt, reply, turn), plan.continuations, prefill)


def _reason(
    evaluator: Evaluator,
    requests: list[Request | Answer],
    reasons: list[int],
    plans: list[_Plan],
    judging: Judging,
    critiques: dict[int, str],
) -> None:
    """Have a critique written first, then ask for the verdict after it (in place)."""
    asked = [r for i in reasons if isinstance(r := requests[i], Request)]
    written = evaluator.write(asked, max_tokens=judging.reason_tokens)
    for i, request, critique in zip(reasons, asked, written, strict=True):
        if isinstance(critique, Failure):
            requests[i] = Answer.failed(critique, "no critique could be written")
            continue
        plan = plans[i % len(plans)]
        critiques[i] = critique.strip()
        requests[i] = _verdict(request, plan, critiques[i])


def _verdict(request: Request, plan: _Plan, critique: str) -> Request:
    """The question after its critique."""
    if isinstance(request.context, str):
        tail = f"{request.context} {critique}\nVerdict ({plan.readout.reply_format}):"
        tail += f" {plan.readout.prefill}" if plan.readout.prefill else ""
        return Request(tail, plan.continuations)
    turns: tuple[Message, ...] = (
        {"role": "assistant", "content": critique},
        {"role": "user", "content": f"Now give only the verdict: {plan.readout.reply_format}."},
    )
    return Request((*request.context, *turns), plan.continuations, plan.readout.prefill)


def read(answer: Answer, plan: _Plan, evaluator: str, critique: str | None = None) -> Judgement:
    """Apply the read-out to one answer; a missing, infinite or NaN log-probability is a failure."""
    base: dict[str, Any] = {
        "evaluator": evaluator,
        "question": plan.question.name,
        "critique": critique,
        "detail": answer.detail,
        "tokens_in": answer.tokens_in,
        "tokens_cached": answer.tokens_cached,
        "tokens_out": answer.tokens_out,
        "cost": answer.cost,
    }
    if answer.logprobs is None:
        return Judgement(score=None, failure=answer.failure or Failure.MALFORMED, **base)
    if any(math.isnan(lp) or lp == math.inf or lp > 1e-3 for lp in answer.logprobs):
        return Judgement(score=None, failure=Failure.NOT_A_NUMBER, **base)
    values = dict(zip(plan.continuations, answer.logprobs, strict=True))
    labels = {label: log_sum_exp([values[s] for s in ss]) for label, ss in plan.spellings.items()}
    total = log_sum_exp(list(labels.values()))
    if math.isinf(total) or math.isinf(labels.get(plan.question.target, total)):
        # log 0: the number exists in principle, but no finite reward can be made of it
        return Judgement(score=None, failure=Failure.NOT_A_NUMBER, **base)
    score, probability = plan.readout.score(labels, plan.question.target)
    base["bounded"] = _bounded(answer, plan)
    return Judgement(score=score, probability=probability, logprobs=labels, mass=min(1.0, math.exp(total)), **base)


def _bounded(answer: Answer, plan: _Plan) -> bool:
    """Whether spellings that the server did not return could make a difference to a label's probability."""
    values = dict(zip(plan.continuations, answer.logprobs or (), strict=True))
    unknown = {s for s, bound in zip(plan.continuations, answer.bounded, strict=False) if bound}

    def probability(spellings: set[str]) -> float:
        return math.fsum(math.exp(values[s]) for s in spellings)

    return any(
        probability(unknown & {*spellings}) > NEGLIGIBLE * probability({*spellings} - unknown)
        for spellings in plan.spellings.values()
    )

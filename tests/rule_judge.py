"""An evaluator with a rule instead of weights: for tests of what is made of judgements."""

import math
import re
from collections.abc import Callable, Sequence

from rlme.judgement import Answer, Failure, Message, Request


def text_of(context: str | tuple[Message, ...]) -> str:
    return context if isinstance(context, str) else "\n".join(m["content"] for m in context)


class RuleJudge:
    """`rule(text of the context)` is p(YES); among lettered answers each has the weight `quality(answer)`."""

    def __init__(
        self,
        rule: Callable[[str], float] = lambda text: 0.5,
        *,
        quality: Callable[[str], float] = lambda answer: 1.0,
        mass: float = 0.9,
        name: str = "rule",
        chat: bool = False,
        fail_on: str | None = None,
        first_letter_bonus: float = 1.0,
    ) -> None:
        self.rule, self.quality, self.mass, self.name, self.chat = rule, quality, mass, name, chat
        self.fail_on, self.bonus = fail_on, first_letter_bonus
        self.requests: list[Request] = []

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Answer:
        self.requests.append(request)
        text = text_of(request.context)
        if self.fail_on is not None and self.fail_on in text:
            return Answer.failed(Failure.TIMEOUT, "asked to fail")
        words = [c.strip(" ø").lower() for c in request.continuations]
        if "a" in words:
            answers = re.findall(r"### Answer [A-Z]\n(.*?)(?=\n\n### Answer|\n\nWhich answer)", text, re.S)
            weights = [self.quality(a) * (self.bonus if i == 0 else 1.0) for i, a in enumerate(answers)]
            shares = {chr(97 + i): w / sum(weights) for i, w in enumerate(weights)}
        else:
            p = self.rule(text)
            shares = {"yes": p, "no": 1 - p}
        return Answer(
            tuple(math.log(max(1e-9, self.mass * shares[w] / words.count(w))) for w in words),
            tokens_in=len(text.split()),
        )

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        return ["It is what it is." for _ in requests]

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(candidates))

    def count_tokens(self, context: str | tuple[Message, ...]) -> int:
        return len(text_of(context).split())

"""A deterministic evaluator for tests of pairwise judging: it reads the outputs in the prompt and weighs
them.
"""

import math
import re
from collections.abc import Callable, Sequence

from rlme.judgement import Answer, Failure, Message, Request


def overlap(text: str, reference: str) -> float:
    """Share of the reference's words that the text has."""
    words = set(reference.lower().split())
    return len(words & set(text.lower().split())) / len(words) if words else 0.0


class FakeJudge:
    """Prefers the output with the higher `quality(output, instruction, reference)`; `bias` is for the first
    place.
    """

    def __init__(
        self,
        quality: Callable[[str, str, str], float] = lambda output, instruction, reference: overlap(output, reference),
        *,
        bias: float = 0.0,
        sharpness: float = 4.0,
        mass: float = 0.9,
        chat: bool = True,
        name: str = "fake",
        fail_on: str | None = None,
        missing_on: str | None = None,
    ) -> None:
        self.quality, self.bias, self.sharpness, self.mass = quality, bias, sharpness, mass
        self.chat, self.name, self.fail_on, self.missing_on = chat, name, fail_on, missing_on
        self.requests: list[Request] = []

    def logprobs(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Answer:
        self.requests.append(request)
        prompt = text_of(request.context)
        if self.fail_on and self.fail_on in prompt:
            return Answer.failed(Failure.TIMEOUT, "asked to fail")
        parts = sections(prompt)
        reference = parts.get("reference", "")
        a = self.quality(parts["output_a"], parts["instruction"], reference)
        b = self.quality(parts["output_b"], parts["instruction"], reference)
        p = 1 / (1 + math.exp(-(self.sharpness * (a - b) + self.bias)))
        p = min(max(p, 1e-9), 1 - 1e-9)
        half = len(request.continuations) // 2
        logprobs = [math.log(self.mass * p / half)] * half + [math.log(self.mass * (1 - p) / half)] * half
        missing = bool(self.missing_on and self.missing_on in prompt)
        bounded = (False,) * half + (missing,) * half
        return Answer(tuple(logprobs), tokens_in=len(prompt.split()), tokens_cached=1, bounded=bounded)

    def write(self, requests: Sequence[Request], *, max_tokens: int) -> list[str | Failure]:
        return ["Both have merits. Therefore, the better output is Output (b)." for _ in requests]

    def spellings(self, candidates: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for c in candidates if c in ("a", "b", "A", "B", "one", "two"))

    def count_tokens(self, context: str | tuple[Message, ...]) -> int | None:
        return len(text_of(context).split())


def text_of(context: str | tuple[Message, ...]) -> str:
    return context if isinstance(context, str) else "\n".join(m["content"] for m in context)


def sections(prompt: str) -> dict[str, str]:
    """The parts of a rendered built-in template, by heading."""
    found: dict[str, str] = {}
    for title, body in re.findall(r"^# ([^\n]*)\n(.*?)(?=^# |\Z)", prompt, flags=re.M | re.S):
        body = body.strip()
        if title.startswith("Output (a)"):
            found["output_a"] = body
        elif title.startswith("Output (b)"):
            found["output_b"] = body.split("\n\n")[0]
        elif title.startswith("Instruction"):
            found["instruction"] = body
        else:
            found["reference"] = body.split("\n\n")[0]
    return found

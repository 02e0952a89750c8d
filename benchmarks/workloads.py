"""What is measured: prompts, group sizes, questions, evaluators, and who runs it. Speed depends on lengths, not on what
is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Word problems of the length of GSM8K's; written for this file.
PROBLEMS = (
    "A baker fills 14 trays with 12 rolls each in the morning. At noon she gives a quarter of the rolls to a school "
    "kitchen and sells 38 of the others before closing. The next day she bakes 20 more and sells half of all she has. "
    "How many rolls are left in the shop?",
    "Tom's train leaves at 9:20 and takes 2 hours and 45 minutes. He then waits 25 minutes for a bus that needs twice "
    "as long as he waited. On the way back everything takes 10 minutes more. How many minutes does he travel in all?",
    "In a garden there are 6 rows of tomato plants with 9 plants each. Each plant bears 5 tomatoes a week for 4 weeks. "
    "A third of the tomatoes is made into sauce, and one jar of sauce takes 12 tomatoes. How many jars can be filled?",
    "A library lends 240 books on Monday, 15 percent fewer on Tuesday, and as many on Wednesday as on the two days "
    "before together. On Thursday 97 of the books come back. How many books are out on Thursday evening?",
)
ADVICE = " Think briefly, then give the final answer in \\boxed{}."
FILLER = "The notes of the committee say that the plan was discussed at length and changed in several places. "

QUESTIONS = (
    "Is the final answer correct?",
    "Is every step of the reasoning valid?",
    "Does the solution answer the question asked?",
    "Is the solution free of repetition?",
    "Is the arithmetic right?",
    "Is the answer given in a box?",
    "Would a teacher accept this solution?",
    "Is the solution easy to follow?",
)


@dataclass(frozen=True)
class Workload:
    """One training step: `prompts` x `group` completions, `questions` to each of `evaluators` frozen copies."""

    name: str
    prompts: int = 4
    group: int = 8
    prompt_tokens: int | None = None  # None: the word problems as they are, about 90 tokens
    completion_tokens: int = 96
    questions: int = 3
    evaluators: int = 1
    # Tokens of one training pass on our side, on a CPU: a few times a prompt, few enough to keep memory low.
    token_budget: int = 2048
    live: bool = False  # the policy itself judges, with its current weights, instead of frozen copies

    def messages(self, tokenizer: Any) -> list[list[dict[str, str]]]:
        """Prompts as chats; longer ones are filled up at the front, cut to length in tokens."""
        texts = []
        for i in range(self.prompts):
            text = PROBLEMS[i % len(PROBLEMS)] + ADVICE
            if self.prompt_tokens is not None:
                fill = f"Case {i}. " + FILLER * (self.prompt_tokens // 16 + 1)
                ids = tokenizer(fill + text, add_special_tokens=False)["input_ids"]
                text = tokenizer.decode(ids[-self.prompt_tokens :] if len(ids) > self.prompt_tokens else ids)
                text = f"Case {i}. {text}"
            texts.append(text)
        return [[{"role": "user", "content": text}] for text in texts]


GPU = torch.cuda.is_available()
# First steps of a side. The optimizer's state and the process's heap still grow in the second; a GPU has no such heap.
UNCOUNTED = 1 if GPU else 2
_SMALL = {"prompts": 1, "completion_tokens": 64}
WORKLOADS = {
    w.name: w
    for w in (
        Workload("w1", token_budget=1024),  # holds the group of one prompt; as fast as 2048
        Workload("prompt-64", prompt_tokens=64, **_SMALL),
        Workload("prompt-1024", prompt_tokens=1024, **_SMALL),
        Workload("group-2", group=2, **_SMALL),
        Workload("group-16", group=16, **_SMALL),
        Workload("questions-1", questions=1, **_SMALL),
        Workload("questions-8", questions=8, **_SMALL),
        Workload("live", live=True, **_SMALL),
        Workload("evaluators-3", evaluators=3, **_SMALL),
    )
}

# What `rlme.memory.keep_freed_memory` sets, as its user would have to give it to another program.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1)}
# Rows of a training pass on w1: all, as a GPU wants it; on two cores, of 1, 2, 4, 8, 16 and 32, TRL's fastest update.
BEST = 32 if GPU else 2
SIDES = {
    "ours": "ours",
    "peer": "TRL",
    "peer_best": f"TRL, {BEST} rows",
    "peer_kept": "TRL, memory kept",
    "off": "sharing off",
}


def sides_of(name: str, *, alone: bool) -> tuple[str, ...]:
    """Who runs a workload; `alone`: without a page."""
    if alone:
        return ("ours", "peer", "peer_best") if name == "w1" else ("ours", "peer")
    if name == "w1":
        return ("ours", "peer", "peer_best", "off" if GPU else "peer_kept")  # GPUs have no C library's heap
    return ("ours", "peer", "off")

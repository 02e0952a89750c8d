"""What one more question costs: the judging of w1's completions with 1 to 8 questions, in turns in one process.

    python benchmarks/further_question.py --repeats 15

The completions are sampled once; every count of questions judges the same ones. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from side import JUDGE_BUDGET, PRECISION, wall
from workloads import QUESTIONS, WORKLOADS

from rlme.evaluators.local import LocalEvaluator
from rlme.judging import Judging, Sample, judge
from rlme.models import BUILTIN, load_model, load_tokenizer
from rlme.questions import Question
from rlme.sampling import sample

COUNTS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--repeats", type=int, default=15, help="rounds; one more runs before them and is not counted")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = wall if options.clock == "wall" else time.process_time
    if options.threads:
        torch.set_num_threads(options.threads)
    w1 = WORKLOADS["w1"]
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype=PRECISION)
    contexts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in w1.messages(tokenizer)
    ]
    groups = sample(
        model,
        [tokenizer(context, add_special_tokens=False)["input_ids"] for context in contexts],
        w1.group,
        max_new_tokens=w1.completion_tokens,
        eos_token_ids=[tokenizer.eos_token_id],
    )
    samples = [
        Sample(context, tokenizer.decode(drawn.ids, skip_special_tokens=True))
        for context, group in zip(contexts, groups, strict=True)
        for drawn in group
    ]
    evaluator = LocalEvaluator(model, tokenizer, chat=False, token_budget=JUDGE_BUDGET)

    def judged(count: int) -> tuple[float, int]:
        before, started = evaluator.tokens_computed, clock()
        judge(samples, [Question(ask) for ask in QUESTIONS[:count]], [evaluator], Judging("paper", "marker"))
        return clock() - started, evaluator.tokens_computed - before

    rounds = [{count: judged(count) for count in COUNTS} for _ in range(1 + options.repeats)][1:]
    questions: dict[int, dict[str, float | None]] = {}
    for count in COUNTS:
        added: dict[str, float | None] = {"added": None, "added_tokens": None}
        if count > 1:  # what each question after the first adds, as a share of the first's
            seconds, tokens = ([(row[count][of] / row[1][of] - 1) / (count - 1) for row in rounds] for of in (0, 1))
            added = {"added": statistics.median(seconds), "added_tokens": tokens[0]}
        took = statistics.median(row[count][0] for row in rounds)
        questions[count] = {"seconds": took, "tokens": rounds[0][count][1], **added}
    print(json.dumps({"rounds": options.repeats, "questions": questions}))


if __name__ == "__main__":
    main()

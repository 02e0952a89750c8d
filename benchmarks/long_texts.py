"""What a long text costs that passes of 2,048 tokens share: one prompt with 8 answers, trained and judged; and 8
prompts of 100 tokens, with 4 answers each, behind worked examples half as long as that prompt, trained.

    python benchmarks/long_texts.py

Three ways: all in one pass; in passes that read the long text once; in passes each of which reads it, as is done where
it cannot be held (`rlme.sharing`). Prints a table: seconds, and tokens computed.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
from side import wall
from workloads import QUESTIONS

from rlme.memory import keep_freed_memory, prefer_huge_pages
from rlme.models import BUILTIN, load_model, load_tokenizer
from rlme.scoring import completion_logps, continuation_logprobs, read_prefix
from rlme.training.packs import plan, with_prefixes
from rlme.tree_attention import device_of

ONE_PASS = 1 << 20
WAYS = {"one pass": (ONE_PASS, True), "passes, text held": (None, True), "passes, text read in each": (None, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--prompt", type=int, default=2000, help="its tokens")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a pass")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--stage", nargs="+", help="those whose name has one of these words")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    device = device_of(model)
    keep_freed_memory(device)
    prefer_huge_pages(device)
    draw = random.Random(0)
    prompt, *answers = (draw.choices(range(100, len(tokenizer) - 100), k=n) for n in (options.prompt, *[64] * 8))
    asked = [tokenizer(" " + question, add_special_tokens=False)["input_ids"] for question in QUESTIONS[:3]]
    rows = [(torch.tensor(prompt), torch.tensor(answer)) for answer in answers]
    examples = prompt[: options.prompt // 2]
    behind = [torch.tensor([*examples, *draw.choices(examples, k=100)]) for _ in range(8)]
    rows_behind = [(one, torch.tensor(draw.choices(examples, k=64))) for one in behind for _ in range(4)]
    computed = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal computed
        computed += inputs[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(count)

    def update(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], budget: int, hold: bool) -> None:
        prompts, completions = map(list, zip(*rows, strict=True))
        packs = plan(model, prompts, completions, budget, hold=hold)
        for pack, held in with_prefixes(packs, partial(read_prefix, model)):
            mine = [prompts[i] for i in pack.rows], [completions[i] for i in pack.rows]
            logps, _ = completion_logps(model, *mine, held=held, gives_back=pack.last)
            logps.sum().backward()
        model.zero_grad()

    def judge(budget: int, hold: bool) -> None:
        contexts = [[*prompt, *answer, *question] for answer in answers for question in asked]
        with mock.patch("rlme.scoring.may_hold", lambda *args: hold):
            continuation_logprobs(model, contexts, [[[5]]] * len(contexts), token_budget=budget)

    stages: dict[str, Callable[[int, bool], None]] = {
        "loss and gradient": partial(update, rows),
        "judging": judge,
        "loss behind examples": partial(update, rows_behind),
    }
    stages = {name: run for name, run in stages.items() if any(word in name for word in options.stage or [""])}
    print(f"{device}, {torch.get_num_threads()} threads, {model.dtype}, torch {torch.__version__}\n")
    print("| | " + " | ".join(f"{stage}, s | tokens" for stage in stages) + " |")
    print("|---" * (1 + 2 * len(stages)) + "|")
    for stage in stages.values():  # each compares its ways with the plain one, once
        stage(options.budget, True)
    for way, (budget, hold) in WAYS.items():
        cells = []
        for stage in stages.values():
            seconds = []
            for _ in range(options.repeats):
                computed, started = 0, wall()
                stage(budget or options.budget, hold)
                seconds.append(wall() - started)
            cells.append(f"{statistics.median(seconds):.1f} | {computed:,}")
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Prompts are read into the cache as the model itself reads them, with what they share computed once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlme import prefill
from rlme.key_values import KeyValues
from rlme.prefill import read_prompts
from rlme.prefix_tree import build_row
from rlme.prompt_groups import may_attend, roomy_cache
from rlme.sampling import sample
from rlme.scoring import continuation_logprobs


def tokens(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(30, 300), k=n)


SYSTEM = tokens(60, 0)
# Alike at first, ragged, one the beginning of another, one of one token.
PROMPTS = [[*SYSTEM, *tokens(n, n)] for n in (20, 7, 0, 33)] + [[9], tokens(40, 5), SYSTEM[:45]]


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request: Any, tiny_model_dirs: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[request.param])
    assert may_attend(model, PROMPTS[0])
    return model


@pytest.mark.parametrize("budget", [8192, 50])
@torch.no_grad()
def test_the_cache_and_the_logits_are_the_models_own(model: Any, budget: int, monkeypatch: Any) -> None:
    """Also where the prompts take several passes, which hold what they share from one to the next."""
    monkeypatch.setattr(prefill, "PASS_TOKENS", budget)
    cache = roomy_cache(model)
    computed: list[int] = []
    read_prompts(model, PROMPTS, roomy_cache(model))  # and the comparison of held prefixes with others, once
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    logits = read_prompts(model, PROMPTS, cache)
    hook.remove()
    longest = max(map(len, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        plain = model(input_ids=torch.tensor([prompt]), use_cache=True)
        torch.testing.assert_close(logits[row], plain.logits[0, -1], atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
            for name in ("keys", "values"):
                found = getattr(ours, name)[row, :, longest - len(prompt) :]
                torch.testing.assert_close(found, getattr(theirs, name)[0], atol=1e-4, rtol=1e-4)
    once = len(build_row(PROMPTS).tokens)
    assert (len(computed) == 1) == (budget == 8192)
    # Last tokens, whose logits are wanted, are computed although another pass has read them.
    assert once <= sum(computed) <= once + len(computed)


def test_completions_of_prompts_that_begin_alike_equal_generate(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(prefill, "PASS_TOKENS", 50)
    known = KeyValues()
    found = sample(model, PROMPTS, 2, max_new_tokens=9, temperature=0, eos_token_ids=range(30, 60), keep=known)
    for prompt, group in zip(PROMPTS, found, strict=True):
        plain = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=list(range(30, 60)), pad_token_id=0
        )
        assert group[0].ids == group[1].ids == plain[0, len(prompt) :].tolist()
    # What sampling leaves to judging is what a forward pass over the same text computes.
    contexts = [[*prompt, *group[0].ids, 31] for prompt, group in zip(PROMPTS, found, strict=True)]
    reused, few = continuation_logprobs(model, contexts, [[[5]]] * len(contexts), known=known)
    whole, many = continuation_logprobs(model, contexts, [[[5]]] * len(contexts))
    torch.testing.assert_close(torch.tensor(reused), torch.tensor(whole), atol=1e-4, rtol=0)
    assert few < many / 4

"""Sampling: greedy equals `generate`, draws follow the distribution, rows do not depend on each other."""

import math
import warnings
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlme.cast_weights import weights_in
from rlme.errors import InputError
from rlme.sampling import sample
from rlme.scoring import completion_logps

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [60, 61, 62], [70]]
PLAIN = {"max_new_tokens": 20, "eos_token_ids": [2]}


@pytest.fixture
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir)


@pytest.fixture
def llama(tiny_model_dirs):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])


def ids_of(results):
    return [[one.ids for one in group] for group in results]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_generate(model, penalty):
    """Past the room of the cache, past Gemma's window, with left padding, and with a repetition penalty."""
    found = sample(model, PROMPTS, 2, max_new_tokens=100, temperature=0, repetition_penalty=penalty, eos_token_ids=[2])
    config = GenerationConfig(
        max_new_tokens=100, do_sample=False, repetition_penalty=penalty, eos_token_id=2, pad_token_id=0
    )
    for prompt, group in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        assert group[0].ids == group[1].ids == expected.tolist()
        assert group[0].finished == (expected[-1] == 2)


def tiny_vocabulary_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=6, initializer_range=1.0, **shape)).eval()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda p: p),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"top_k": 2}, lambda p: p * (p >= p.sort(descending=True)[0][1])),
        ({"min_p": 0.4}, lambda p: p * (p >= 0.4 * p.max())),
        ({"top_p": 0.6}, lambda p: p * torch.zeros(6).scatter(0, _nucleus(p, 0.6), 1)),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    model = tiny_vocabulary_model()
    prompt = [1, 2, 3]
    with torch.no_grad():
        wanted = expected(model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1))
    wanted = wanted / wanted.sum()
    n = 4000
    (group,) = sample(model, [prompt], n, max_new_tokens=1, eos_token_ids=[], seed=1, max_rows=n, **options)
    counts = Counter(one.ids[0] for one in group)
    for token, p in enumerate(wanted.tolist()):
        deviation = math.sqrt(p * (1 - p) / n)
        assert abs(counts[token] / n - p) <= 4.5 * deviation + 1e-9
    logps = {one.ids[0]: one.logprobs[0] for one in group}
    for token, logprob in logps.items():
        assert math.exp(logprob) == pytest.approx(wanted[token].item(), abs=1e-5)


def _nucleus(p, top_p):
    ordered, index = p.sort(descending=True)
    return index[ordered.cumsum(0) - ordered < top_p]


def test_logprobs_are_the_policys_own(model):
    """At top-p 1 the trainer may use them as old log-probabilities."""
    groups = sample(model, PROMPTS, 4, temperature=0.7, seed=5, **PLAIN)
    rows = [(prompt, one) for prompt, group in zip(PROMPTS, groups, strict=True) for one in group]
    with torch.no_grad():
        logps, _ = completion_logps(model, [p for p, _ in rows], [one.ids for _, one in rows], temperature=0.7)
    for (_, one), computed in zip(rows, logps.tolist(), strict=True):
        assert len(one.logprobs) == len(one.ids)
        assert one.logprobs == pytest.approx(computed[: len(one.ids)], abs=1e-4)


def test_a_row_does_not_depend_on_the_others(llama):
    options = {**PLAIN, "max_new_tokens": 60, "eos_token_ids": list(range(2, 40)), "seed": 3}
    together = sample(llama, PROMPTS, 6, **options)
    lengths = {len(one.ids) for group in together for one in group}
    assert len(lengths) > 3  # rows left the batch at different times
    assert ids_of(sample(llama, PROMPTS, 6, max_rows=4, **options)) == ids_of(together)
    assert ids_of(sample(llama, PROMPTS[:1], 3, **options)) == [ids_of(together)[0][:3]]
    assert ids_of(sample(llama, PROMPTS, 6, **options | {"seed": 4})) != ids_of(together)
    for group in together:
        assert len({tuple(one.ids) for one in group}) > 1
        for one in group:
            assert not set(one.ids[:-1]) & set(range(2, 40))
            assert one.finished == (one.ids[-1] in range(2, 40))


def test_counts_per_prompt(llama):
    found = sample(llama, PROMPTS, [2, 0, 1], **PLAIN)
    assert [len(group) for group in found] == [2, 0, 1]
    assert sample(llama, [], 4, **PLAIN) == []


def test_each_completion_is_told_of_once_and_as_soon_as_it_is_finished(llama):
    told = {}

    def on_finished(p, c, one):
        assert (p, c) not in told
        told[p, c] = (len(one.ids), one.ids)

    eos = list(range(0, llama.config.vocab_size, 4))  # a quarter of the tokens end a completion
    found = sample(llama, PROMPTS, 3, max_new_tokens=6, eos_token_ids=eos, max_rows=5, on_finished=on_finished)
    assert told == {(p, c): (len(one.ids), one.ids) for p, group in enumerate(found) for c, one in enumerate(group)}
    lengths = [length for length, _ in told.values()]
    assert lengths[:5] == sorted(lengths[:5]) and len(set(lengths)) > 1


def test_stop_strings_end_a_completion(tiny_policy_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    free = sample(model, PROMPTS, 4, seed=1, **PLAIN)
    texts = [tokenizer.decode(one.ids) for group in free for one in group]
    stop = next(c for c in Counter("".join(texts)) if sum(c in t[:-1] for t in texts) > 3 and c.isascii())
    stopped = sample(model, PROMPTS, 4, seed=1, stop_strings=[stop], tokenizer=tokenizer, **PLAIN)
    for before, after in zip((o for g in free for o in g), (o for g in stopped for o in g), strict=True):
        text = tokenizer.decode(after.ids)
        assert before.ids[: len(after.ids)] == after.ids
        assert after.finished == (stop in text or after.ids[-1] == 2)
        assert stop not in tokenizer.decode(after.ids[:-1])


def test_stop_strings_are_looked_for_in_completions_alone(tiny_policy_dir):
    """Not in the prompt, nor in the padding beside a longer one, which repeats a token of it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    with torch.no_grad():  # it says a, and nothing else
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        head.weight.zero_()
        head.bias.fill_(-100.0)[a] = 0.0
    model.set_output_embeddings(head)
    options = {"max_new_tokens": 8, "eos_token_ids": [2], "stop_strings": ["aaa"], "tokenizer": tokenizer}
    groups = sample(model, [[a], [a] * 9], 1, **options)
    assert [one.ids for group in groups for one in group] == [[a] * 3] * 2


def test_what_is_no_option_is_refused(llama):
    for wrong in ({"top_p": 0.0}, {"temperature": -1.0}, {"top_k": -1}, {"max_rows": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(llama, PROMPTS, 1, **PLAIN, **wrong)


def test_adapters_with_tokens_of_their_own_are_refused(llama):
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match="PREFIX_TUNING"):
        sample(model, PROMPTS, 1, **PLAIN)


def test_a_model_that_fails_with_cast_weights_keeps_its_own(llama, monkeypatch):
    """(Some multiply their weights with buffers, which are not cast.)"""
    table = torch.eye(llama.config.hidden_size)
    head = llama.lm_head.forward
    monkeypatch.setattr(llama.lm_head, "forward", lambda hidden: head(torch.matmul(hidden, table)))
    drawn = []
    for dtype in (None, torch.bfloat16, torch.bfloat16):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (group,) = sample(llama, [[5, 6, 7]], 2, max_new_tokens=5, eos_token_ids=[], dtype=dtype)
        drawn.append(
            ([one.ids for one in group], ["keeps the precision" in str(w.message) for w in caught].count(True))
        )
    assert [ids for ids, _ in drawn] == [drawn[0][0]] * 3
    assert [said for _, said in drawn] == [0, 1, 0]


def test_bfloat16_leaves_the_weights_alone(llama):
    before = {name: p for name, p in llama.named_parameters()}
    tied = llama.get_input_embeddings().weight
    with weights_in(llama, torch.bfloat16):
        assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in llama.parameters())
    after = dict(llama.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    assert llama.get_input_embeddings().weight is tied
    assert all(p.requires_grad for p in llama.parameters())
    groups = sample(llama, PROMPTS, 2, dtype=torch.bfloat16, **PLAIN)
    assert all(one.ids for group in groups for one in group)
    assert {p.dtype for p in llama.parameters()} == {torch.float32}


def test_tied_weights_stay_tied_in_bfloat16(tiny_model_dirs):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["qwen2"])
    with weights_in(model, torch.bfloat16):
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_training_mode_is_restored_and_dropout_off(tiny_model_dirs):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"], attention_dropout=0.5).train()
    assert ids_of(sample(model, PROMPTS, 2, **PLAIN)) == ids_of(sample(model, PROMPTS, 2, **PLAIN))
    assert model.training


def test_bad_input(llama):
    with pytest.raises(ValueError, match="prompt is empty"):
        sample(llama, [[]], 1, **PLAIN)
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        sample(llama, PROMPTS, [1, 2], **PLAIN)
    with pytest.raises(ValueError, match="tokenizer"):
        sample(llama, PROMPTS, 1, stop_strings=["x"], **PLAIN)


def test_a_broken_model_ends_sampling(llama):
    with torch.no_grad():
        llama.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample(llama, PROMPTS, 2, **PLAIN)


def test_the_nucleus_equals_the_sorted_one() -> None:
    from transformers import TopPLogitsWarper

    from rlme.sampling import Nucleus

    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1, 1, dtype=torch.long)
    for spread in (0.1, 1.0, 4.0):  # flat ones do not fit into the head and are sorted whole
        for top_p in (0.1, 0.9, 0.95, 0.999):
            scores = torch.randn(6, 3000, generator=generator) * spread
            assert torch.equal(Nucleus(top_p)(ids, scores.clone()), TopPLogitsWarper(top_p)(ids, scores.clone()))

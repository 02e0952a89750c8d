"""Shared prefixes give the numbers of the plain padded path: judging, loss and gradients, on four architectures."""

import copy
import itertools
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from trl.kernels import ChunkedLogProbFunction

from rlme import forward, lm_head, tree_attention
from rlme.key_values import KeyValues
from rlme.lm_head import LMHead, _BlockedLogProbs
from rlme.sampling import sample
from rlme.scoring import completion_logps, continuation_logprobs, plan_rows
from rlme.tree_attention import TreeInputs, install, tree_unsupported_reason

PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7, 8, 9], [20, 21, 22], [23])


@pytest.fixture
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir)


@pytest.fixture
def llama(tiny_model_dirs):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])


def tokens(n, seed=0):
    return random.Random(seed).choices(range(30, 300), k=n)


def logits_of(model, sequence):
    """The oracle: one sequence, no batch, no padding, transformers' own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([sequence])).logits[0].float().log_softmax(-1)


def expected_logprob(model, context, continuation):
    logps = logits_of(model, [*context, *continuation])
    return sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def requests():
    """Prompts that are prefixes of each other, answers to them, questions about the answers, one after another."""
    answers = [[*p, *tokens(n, i)] for i, (p, n) in enumerate(itertools.product(PROMPTS, (0, 1, 9, 30)))]
    contexts = [*answers, *([*a, *tokens(4, 99 + k)] for a in answers for k in range(3)), answers[0], answers[3]]
    contexts += [[*answers[2], *tokens(4, 99), 33, 40, 41]]  # a second question, after the first one's target
    continuations = [[[33], [34], [33, 35], [33, 36, 37]][: 1 + i % 4] for i in range(len(contexts))]
    return contexts, continuations


# -- judging --


@pytest.mark.parametrize("budget", [10_000, 100, 20])
def test_judging_equals_single_forwards(model, budget):
    contexts, continuations = requests()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared, computed = continuation_logprobs(model, contexts, continuations, token_budget=budget)
        plain, padded = continuation_logprobs(model, contexts, continuations, token_budget=budget, share=False)
    for context, asked, ours, other in zip(contexts, continuations, shared, plain, strict=True):
        for continuation, logprob, logprob_plain in zip(asked, ours, other, strict=True):
            expected = expected_logprob(model, context, continuation)
            assert logprob == pytest.approx(expected, abs=1e-4)
            assert logprob_plain == pytest.approx(expected, abs=1e-4)
    assert computed < padded


def test_every_token_is_computed_once(llama):
    prompt, answers = tokens(50), [tokens(20, 1), tokens(20, 2)]
    contexts = [[*prompt, *a, *q] for a in answers for q in ([40], [41, 42], [41, 42])]
    _, computed = continuation_logprobs(llama, contexts, [[[1], [2]]] * len(contexts))
    assert computed == 50 + 2 * (20 + 1 + 2)  # single-token labels cost nothing, a repeated context neither
    _, computed = continuation_logprobs(llama, [prompt], [[[1, 3], [2, 3], [1]]])
    assert computed == 50 + 2


def test_nothing_asked_and_bad_requests(llama):
    assert continuation_logprobs(llama, [], []) == ([], 0)
    assert continuation_logprobs(llama, [[1]], [[]]) == ([[]], 0)
    with pytest.raises(ValueError, match="continuation is empty"):
        continuation_logprobs(llama, [[1]], [[[]]])
    with pytest.raises(ValueError, match="context is empty"):
        continuation_logprobs(llama, [[]], [[[1]]])


def test_a_broken_model_gives_nan_not_a_number(llama):
    with torch.no_grad():
        llama.lm_head.weight[7] = float("nan")
    values, _ = continuation_logprobs(llama, [[1, 2, 3], [1, 2, 4]], [[[5], [7]]] * 2)
    assert all(math.isnan(value) for row in values for value in row)


def test_bfloat16_models_are_scored(llama):
    contexts, continuations = requests()
    exact, _ = continuation_logprobs(llama, contexts, continuations)
    rounded, _ = continuation_logprobs(llama.to(torch.bfloat16), contexts, continuations)
    flat = [abs(a - b) for r, s in zip(exact, rounded, strict=True) for a, b in zip(r, s, strict=True)]
    assert sum(flat) / len(flat) < 0.1


def test_dropout_is_off_and_the_mode_is_restored(tiny_model_dirs):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"], attention_dropout=0.5).train()
    first, second = (continuation_logprobs(model, [[1, 2, 3], [1, 2, 4]], [[[5]]] * 2)[0] for _ in range(2))
    assert first == second
    assert model.training


# -- loss --

GROUPS = (
    [(0, n) for n in (7, 3, 0, 1, 12, 7)]  # ragged, empty, one token
    + [(1, 30)]  # a group of one, and a prompt that is a prefix of the first
    + [(2, 1), (2, 1), (3, 5), (3, 9)]
)
ROWS = [(PROMPTS[p], tokens(n, i)) for i, (p, n) in enumerate(GROUPS)]
ROWS.append(ROWS[0])  # an identical completion


def loss_and_gradients(model, **options):
    model.zero_grad()
    prompts, completions = zip(*ROWS, strict=True)
    logps, entropy = completion_logps(model, prompts, completions, compute_entropy=True, **options)
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    ((weights * logps).sum() + 0.1 * (weights**2 * entropy).sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logps.detach(), entropy.detach(), gradient


def oracle(model, temperature):
    """Plain autograd through each row's own logits."""
    model.zero_grad()
    longest = max(len(completion) for _, completion in ROWS)
    logps, entropies = [], []
    for prompt, completion in ROWS:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        full = (logits[: len(completion)] / temperature).log_softmax(-1)
        pad = (0, longest - len(completion))
        picked = full.gather(-1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]
        logps.append(torch.nn.functional.pad(picked, pad))
        entropies.append(torch.nn.functional.pad(-(full.exp() * full).sum(-1), pad))
    logps, entropies = torch.stack(logps), torch.stack(entropies)
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    ((weights * logps).sum() + 0.1 * (weights**2 * entropies).sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logps.detach(), entropies.detach(), gradient


def assert_equal(found, expected):
    for name, ours, theirs in zip(("logps", "entropy"), found, expected, strict=False):
        assert (ours - theirs).abs().max() <= 1e-4, name
    assert (found[2] - expected[2]).norm() / expected[2].norm() <= 1e-4


@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_equal_plain_autograd(model, share):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(loss_and_gradients(model, temperature=0.7, share=share), oracle(model, 0.7))


def test_gradient_checkpointing_recomputes_with_the_same_tree(model):
    expected = loss_and_gradients(model, temperature=1.0)
    model.gradient_checkpointing_enable()
    model.train()
    assert_equal(loss_and_gradients(model, temperature=1.0), expected)


def test_packs_add_up_to_the_whole(llama):
    prompts, completions = zip(*ROWS, strict=True)
    whole = loss_and_gradients(llama)
    weights = torch.linspace(-1, 1, whole[0].numel()).view_as(whole[0])
    llama.zero_grad()
    packs = plan_rows(llama, prompts, completions, 30)
    assert len(packs) > 2
    assert sorted(i for pack in packs for i in pack) == list(range(len(ROWS)))
    for pack in packs:
        logps, entropy = completion_logps(
            llama, [prompts[i] for i in pack], [completions[i] for i in pack], compute_entropy=True
        )
        mine = weights[pack][:, : logps.shape[1]]
        ((mine * logps).sum() + 0.1 * (mine**2 * entropy).sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in llama.parameters()])
    assert (gradient - whole[2]).norm() / whole[2].norm() <= 1e-4
    with torch.no_grad():
        in_packs, _ = completion_logps(llama, prompts, completions, token_budget=30)
    assert (in_packs - whole[0]).abs().max() <= 1e-4


def test_shape_dtype_and_zero_padding(llama):
    logps, entropy = completion_logps(llama, [torch.tensor([1, 2]), [3]], [[4, 5, 6], torch.tensor([7])])
    assert logps.shape == (2, 3)
    assert logps.dtype == torch.float32
    assert entropy is None
    assert logps[1, 1:].tolist() == [0, 0]
    empty, _ = completion_logps(llama, [[1, 2]], [[]])
    assert empty.shape == (1, 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        completion_logps(llama, [[]], [[1]])


def test_lora_and_autocast(tiny_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert_equal(loss_and_gradients(model), loss_and_gradients(model, share=False))
    with torch.autocast("cpu", torch.bfloat16):
        shared, plain = loss_and_gradients(model), loss_and_gradients(model, share=False)
    assert (shared[0] - plain[0]).abs().mean() < 0.05
    assert (shared[2] - plain[2]).norm() / plain[2].norm() < 0.15


def test_lora_on_the_head_is_not_left_out(llama):
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    expected = logits_of(model, [5, 6, 7, 8])
    logps, _ = completion_logps(model, [[5, 6]], [[7, 8]])
    assert logps[0].tolist() == pytest.approx([expected[1, 7].item(), expected[2, 8].item()], abs=1e-4)
    values, _ = continuation_logprobs(model, [[5, 6]], [[[7, 8]]])
    assert values[0][0] == pytest.approx(logps.sum().item(), abs=1e-4)


@pytest.mark.parametrize("heads, kinds", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("block", [1, 3 * 7 * 11, 1 << 20])
def test_attention_by_products_equals_fused_attention(heads, kinds, block, monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_SCORES", block)
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, heads, 7, 8), (5, kinds, 11, 8), (5, kinds, 11, 8))
    ours = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    fused = [x.detach().clone().requires_grad_() for x in ours]
    mask = torch.zeros(5, 1, 7, 11).masked_fill(torch.rand((5, 1, 7, 11), generator=draw) < 0.4, float("-inf"))
    mask[..., 0] = 0
    kept = mask.clone()
    results = (
        tree_attention._attend_by_products(*ours, mask, 0.3),
        torch.nn.functional.scaled_dot_product_attention(*fused, attn_mask=mask, scale=0.3, enable_gqa=True),
    )
    torch.testing.assert_close(*results)
    torch.testing.assert_close(mask, kept)
    weights = torch.randn(results[0].shape, generator=draw)
    for result in results:
        (result * weights).sum().backward()
    for mine, other in zip(ours, fused, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("tile_rows", [600, 256, 1], ids="tile of {} rows".format)
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, True), (5.0, 1.3, False)])
def test_blocked_head_equals_trl(softcap, scale, bias, tile_rows, monkeypatch):
    monkeypatch.setattr(lm_head, "TILE", tile_rows * 101)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((600, 16), (101, 16), (101,))]
    hidden, weight, offset = tensors if bias else (*tensors[:2], None)
    targets = torch.randint(0, 101, (600,), generator=generator)
    found = _BlockedLogProbs.apply(hidden, weight, offset, targets, 0.7, scale, softcap, True)
    expected = ChunkedLogProbFunction.apply(hidden, weight, offset, targets, 0.7, 32, softcap, scale, ("entropy",))[:2]
    weights = torch.linspace(-1, 1, 600)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    wanted = [t for t in (hidden, weight, offset) if t is not None]
    ours, theirs = ((weights * a).sum() + (weights**2 * b).sum() for a, b in (found, expected))
    theirs = torch.autograd.grad(theirs, wanted)
    for _ in range(2):  # the first pass takes the forward pass's last tile, the second makes it again
        for a, b in zip(torch.autograd.grad(ours, wanted, retain_graph=True), theirs, strict=True):
            assert (a - b).norm() / b.norm() < 1e-5


def test_autocast_leaves_the_entropy_in_float32():
    hidden, weight = torch.randn(20, 32), torch.randn(5000, 32) / 2
    with torch.autocast("cpu", torch.bfloat16):
        logps, entropy = _BlockedLogProbs.apply(hidden, weight, None, torch.arange(20), 1.0, 1.0, None, True)
    plain = (hidden.bfloat16() @ weight.bfloat16().t()).double().log_softmax(-1)
    assert (logps - plain.diagonal()).abs().max() < 1e-4
    assert (entropy + (plain.exp() * plain).sum(-1)).abs().max() < 1e-4


def test_the_last_tile_is_computed_once(monkeypatch):
    """One that the forward pass has left for the backward pass gives the same gradient as one made again."""
    made = []

    def tile(*args):
        made.append(len(args[0]))
        return make(*args)

    make = lm_head._tile
    monkeypatch.setattr(lm_head, "_tile", tile)
    monkeypatch.setattr(lm_head, "TILE", 16 * 101)
    hidden, weight = torch.randn(40, 16).requires_grad_(), torch.randn(101, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        arguments = (hidden, weight, None, torch.arange(40), 0.7, 1.3, None, True)
        total = sum(x.sum() for x in _BlockedLogProbs.apply(*arguments))
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    assert made == [16, 16, 8, 16, 16]
    second = torch.autograd.grad(total, (hidden, weight))
    assert made[5:] == [8, 16, 16]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- property: any tree --

_random_model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
).eval()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=12))
def test_hidden_states_of_any_tree_equal_plain_forwards(given_sequences):
    install(_random_model)
    tree = TreeInputs(given_sequences, torch.device("cpu"))
    with torch.no_grad():
        row = _random_model(**tree.kwargs).logits[0]
        for sequence, path in zip(given_sequences, tree.paths, strict=True):
            alone = _random_model(input_ids=torch.tensor([sequence])).logits[0]
            assert (row[torch.from_numpy(path)] - alone).abs().max() < 1e-4


# -- wrappers and files --


@pytest.mark.parametrize("find_unused", [False, True])
def test_distributed_data_parallel(llama, tmp_path, find_unused):
    expected = loss_and_gradients(llama)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(llama, find_unused_parameters=find_unused)
        found = [loss_and_gradients(wrapped) for _ in range(2)]
        # The wrapper goes first: were its reducer the last to hold the group, the group's threads would be joined under
        # the interpreter's lock, which one of them may be waiting for.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    for each in found:
        assert_equal(each, expected)


def test_a_saved_model_knows_nothing_of_the_tree(llama, tmp_path):
    install(llama)
    llama.save_pretrained(tmp_path)
    assert "rlme" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# -- what cannot share --


def test_installing_changes_nothing_else(model):
    untouched = copy.deepcopy(model)
    install(model)
    install(model)
    ids = torch.tensor([tokens(20), [1] * 5 + tokens(15, 3)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, untouched(input_ids=ids, attention_mask=mask).logits
    )
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), untouched.generate(ids, **options))


def test_a_recurrent_model_takes_the_plain_path_with_one_warning():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    assert tree_unsupported_reason(model)
    contexts, continuations = [[1, 2, 3], [1, 2, 4, 5]], [[[6], [7, 8]]] * 2
    with pytest.warns(UserWarning, match="prefixes are not shared"):
        values, _ = continuation_logprobs(model, contexts, continuations)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = continuation_logprobs(model, contexts, continuations)
    assert values == again
    for context, asked, row in zip(contexts, continuations, values, strict=True):
        for continuation, value in zip(asked, row, strict=True):
            assert value == pytest.approx(expected_logprob(model, context, continuation), abs=1e-4)


def test_unsupported_settings_are_named(tiny_model_dirs):
    eager = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"], attn_implementation="eager")
    assert "eager" in tree_unsupported_reason(eager)
    gemma = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["gemma3"])
    gemma.config.attn_logit_softcapping = 50.0
    assert "attn_logit_softcapping" in tree_unsupported_reason(gemma)
    gemma.config.attn_logit_softcapping = None
    gemma.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    assert "linear_attention" in tree_unsupported_reason(gemma)


def test_the_self_check_catches_a_wrong_tree(llama, monkeypatch):
    positions = forward.TreeInputs

    class Wrong(positions):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.kwargs["position_ids"] = self.kwargs["position_ids"] * 3

    monkeypatch.setattr(forward, "TreeInputs", Wrong)
    contexts, continuations = requests()
    with pytest.warns(UserWarning, match="log-probabilities differ"):
        values, _ = continuation_logprobs(llama, contexts, continuations)
    assert values[5][0] == pytest.approx(expected_logprob(llama, contexts[5], continuations[5][0]), abs=1e-4)


def test_a_scaled_head_is_scaled(llama):
    llama.config.logit_scale = 0.5
    head = LMHead(llama)
    hidden = torch.randn(3, 32)
    expected = (llama.lm_head(hidden) * 0.5).log_softmax(-1)
    found = head.read(hidden, torch.tensor([0, 0, 2]), torch.tensor([4, 5, 6]))
    assert found.tolist() == pytest.approx(
        [expected[0, 4].item(), expected[0, 5].item(), expected[2, 6].item()], abs=1e-5
    )


# -- keys and values that sampling computed --


def sampled_requests(model, seed=3):
    """Completions with what the cache held, and questions after them: after the whole text, a part of it, another."""
    known = KeyValues()
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    groups = sample(model, prompts, [3, 1, 2], max_new_tokens=12, eos_token_ids=range(30, 80), seed=seed, keep=known)
    answers = [[*p, *one.ids] for p, group in zip(prompts, groups, strict=True) for one in group]
    answers += [[*answers[0][:-2], 7, 8], [*PROMPTS[3], 9], [*PROMPTS[0]]]
    contexts = [[*a, *tokens(4, 99 + k)] for a in answers for k in range(3)] + answers
    return known, contexts, [[[33], [34, 35]] for _ in contexts]


@pytest.mark.parametrize("budget", [10_000, 40])
def test_what_sampling_computed_is_not_computed_again(tiny_model_dirs, budget):
    for name in ("llama", "qwen2", "qwen3"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[name])
        known, contexts, continuations = sampled_requests(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reused, few = continuation_logprobs(model, contexts, continuations, token_budget=budget, known=known)
        whole, many = continuation_logprobs(model, contexts, continuations, token_budget=budget)
        for row, expected in zip(reused, whole, strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
        assert few < many
        if budget == 10_000:  # three questions of 4 tokens and the first token of the second label; little else
            assert few < 9 * 3 * 5 + 30


def test_stale_keys_and_values_are_noticed(tiny_model_dirs):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    known, contexts, continuations = sampled_requests(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="not reused"):
        values, _ = continuation_logprobs(model, contexts, continuations, known=known)
    for row, expected in zip(values, continuation_logprobs(model, contexts, continuations)[0], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_sliding_windows_and_a_full_store_hold_nothing(tiny_model_dirs):
    known, _, _ = sampled_requests(AutoModelForCausalLM.from_pretrained(tiny_model_dirs["gemma3"]))
    assert known.tokens == 0
    small = KeyValues(limit=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    sample(model, [PROMPTS[0]], 2, max_new_tokens=4, eos_token_ids=[2], keep=small)
    assert small.tokens == 0


def test_a_bfloat16_models_head_reads_almost_as_float64(tiny_model_dirs):
    """Logits are rounded as differences from the one that is asked for, not as themselves: these are above 100."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(40, model.config.hidden_size, generator=generator) * 3).bfloat16()
    weight = model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        weight += 128 / hidden[:1].float().norm() ** 2 * hidden[:1].float()  # the same to all logits of a row
    targets = torch.randint(0, model.config.vocab_size, (40,), generator=generator)
    logits = hidden.double() @ weight.double().t()
    assert float(logits[0].min()) > 100
    targets[0] = logits[0].argmax()  # which the others' rounding could hide
    found = LMHead(model).read(hidden, torch.arange(40), targets)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, atol=5e-3, rtol=4e-3)
    plain = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert float((found - expected).abs().mean()) < 0.2 * float((plain - expected).abs().mean())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [8192, 64])
def test_what_is_said_of_a_text_does_not_depend_on_longer_ones(share, budget):
    """Where the rotary embedding follows the longest text of a pass (Phi-4-mini and its kin)."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
            rope_parameters={**rope, "original_max_position_embeddings": 32},
        )
    ).eval()  # fmt: skip
    short, long = tokens(20, 1), tokens(60, 2)
    asked = [[[7]], [[7]]]
    with torch.no_grad():
        alone = [model(torch.tensor([text])).logits[0, -1].log_softmax(-1)[7].item() for text in (short, long)]
    found, _ = continuation_logprobs(model, [short, long], asked, share=share, token_budget=budget)
    assert [one[0] for one in found] == pytest.approx(alone, abs=1e-4)
    logps, _ = completion_logps(model, [short[:10], long[:10]], [short[10:], long[10:]], share=share)
    for row, text in zip(logps, (short, long), strict=True):
        alone_, _ = completion_logps(model, [text[:10]], [text[10:]], share=share)
        torch.testing.assert_close(row[: len(text) - 10], alone_[0], atol=1e-4, rtol=0)


def test_a_context_that_ends_inside_what_sampling_held(tiny_model_dirs):
    """Its last token is computed, what is held of others on both sides of it is not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    known = KeyValues()
    (first, second), *_ = sample(model, [[5, 6, 7, 8]], 2, max_new_tokens=6, eos_token_ids=[], keep=known)
    a, b = [5, 6, 7, 8, *first.ids], [5, 6, 7, 8, *second.ids]
    contexts = [[*a[:9], 50], [5, 6, 7, 8], b[:7], [*a[:6], 1, 2]]
    continuations = [[[9]], [[34, 35]], [[3, 4], [5]], [[1, 2, 3]]]
    reused, few = continuation_logprobs(model, contexts, continuations, known=known)
    whole, many = continuation_logprobs(model, contexts, continuations)
    assert few < many
    for row, expected in zip(reused, whole, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_a_changed_attention_is_noticed(tiny_model_dirs):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"], attn_implementation="sdpa")
    request = [[1, 2, 3, 4], [1, 2, 3, 5]], [[[6]], [[7]]]
    before, _ = continuation_logprobs(model, *request)
    model.set_attn_implementation("sdpa")
    drawn = sample(model, [[1, 2, 3]], 2, max_new_tokens=3, temperature=0.0, eos_token_ids=[])
    model.set_attn_implementation("eager")
    assert (
        sample(model, [[1, 2, 3]], 2, max_new_tokens=3, temperature=0.0, eos_token_ids=[])[0][0].ids == drawn[0][0].ids
    )
    for row, expected in zip(continuation_logprobs(model, *request)[0], before, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_an_lm_head_in_float32_under_autocast(tiny_model_dirs, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["llama"])
    plain, seen = lm_head._tile, []

    def tile(hidden, weight, bias):
        seen.append((hidden.dtype, weight.dtype))
        return plain(hidden, weight, bias)

    monkeypatch.setattr(lm_head, "_tile", tile)
    for exact, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        completion_logps(model, [[5, 6, 7]], [[8, 9]])  # the comparison of both ways
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = completion_logps(model, [[5, 6, 7]] * 2, [[8, 9, 10], [11, 12]], float32_head=exact)
        logps.sum().backward()
        assert seen == [(dtype, dtype)]

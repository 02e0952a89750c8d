"""Models that prefixes cannot be shared in, or whose head or cache is unlike the others': the plain path is right, and
says why it is taken."""

import math
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BloomConfig,
    DogeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    ModernBertDecoderConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

import rlme.decoding
from rlme.cli import main
from rlme.decoding import CachedRows, RecomputedRows, begin
from rlme.errors import InputError
from rlme.sampling import sample
from rlme.scoring import completion_logps, continuation_logprobs, plan_rows
from tests.tiny_runs import read_metrics, read_rollouts, write_config

SIZE = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
MODELS = {
    # its forward calls the decoder inside the backbone
    "opt": OPTConfig(**SIZE, **SPECIAL, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    # chunked attention; a text model that is its own base model
    "llama4": Llama4TextConfig(
        **SIZE, **HEADS, **SPECIAL, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=48
    ),
    # a layer between the backbone and the head
    "modernbert": ModernBertDecoderConfig(
        **SIZE, **SPECIAL, num_attention_heads=4, local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    # a soft cap of another name; states inside the model
    "recurrent_gemma": RecurrentGemmaConfig(
        **SIZE, **SPECIAL, num_attention_heads=4, num_key_value_heads=1, head_dim=8, lru_width=32,
        attention_window_size=8, logits_soft_cap=3.0,
    ),
    # a scale in front of the head that other models apply behind it
    "minicpm3": MiniCPM3Config(
        **SIZE, **SPECIAL, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, dim_model_base=8,
    ),
    # linear attention beside full attention
    "qwen3_next": Qwen3NextConfig(
        **SIZE, **HEADS, **SPECIAL, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"] * 2,
    ),
    # states only, under another name than keys and values
    "mamba": MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0),
    # no cache at all
    "openai-gpt": OpenAIGPTConfig(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}  # fmt: skip
PROMPTS = [list(range(30, 51)), list(range(30, 51)), list(range(30, 50)), list(range(60, 73))]
COMPLETIONS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16], [20, 21, 22, 23, 24, 25], [26, 27, 28, 29, 30, 31, 32]]


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25 if parameter.shape[-1] <= 64 else 0.1)
    return model.eval()


def save(config, tokenizer_of, folder, make=AutoModelForCausalLM.from_config):
    """A model of this configuration, with the tokenizer of another; its folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    make(type(config)(**{**config.to_diff_dict(), "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def whole_logps(model, prompt, completion):
    logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])[:, 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*correct, but")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_whole_forwards(name):
    model = build(MODELS[name])
    logps, _ = completion_logps(model, PROMPTS, COMPLETIONS)
    plain = [whole_logps(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for row, expected in zip(logps, plain, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-4)
    found, expected = (gradients(model, loss) for loss in (logps.sum(), sum(row.sum() for row in plain)))
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*correct, but")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_judging_equals_whole_forwards(name, share):
    model = build(MODELS[name])
    contexts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    found, _ = continuation_logprobs(model, contexts, [[[7], [8, 9]]] * 4, share=share)
    with torch.no_grad():
        expected = [[whole_logps(model, c, asked).sum().item() for asked in ([7], [8, 9])] for c in contexts]
    assert [x for row in found for x in row] == pytest.approx([x for row in expected for x in row], abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*correct, but")
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate(name):
    """Prompts of different length; rows that end leave the batch."""
    model = build(MODELS[name])
    found = sample(model, [PROMPTS[0], PROMPTS[3]], 2, max_new_tokens=12, temperature=0, eos_token_ids=[2, 3, 4])
    for prompt, group in zip([PROMPTS[0], PROMPTS[3]], found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[2, 3, 4], pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert [one.ids for one in group] == [expected] * 2


@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_hybrid_models_read_each_prompt_once(name):
    model = build(MODELS[name])
    with torch.no_grad():
        rows = begin(model, PROMPTS)
    assert type(rows) is CachedRows
    assert rows.ours is None


@pytest.mark.parametrize(("name", "reason"), [("qwen3_next", "linear_attention"), ("llama4", "chunked_attention")])
def test_why_prefixes_are_not_shared_is_said(name, reason):
    with pytest.warns(UserWarning, match=f"prefixes are not shared.*{reason}"):
        completion_logps(build(MODELS[name]), PROMPTS, COMPLETIONS)


def test_a_model_without_a_cache_reads_whole_rows_and_says_so():
    model = build(MODELS["openai-gpt"])
    with torch.no_grad(), pytest.warns(UserWarning, match="its whole text is read again"):
        assert type(begin(model, PROMPTS)) is RecomputedRows


@pytest.mark.filterwarnings("ignore:.*correct, but")
def test_prompts_of_even_length_where_padding_is_seen(monkeypatch):
    """A model that does not look at the mask of its cache: padding would be read as tokens."""
    model = build(MODELS["qwen3_next"])
    read = model.forward

    def without_mask(*args, attention_mask=None, use_cache=False, **kwargs):
        return read(*args, attention_mask=None if use_cache else attention_mask, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(model, "forward", without_mask)
    begun = []
    monkeypatch.setattr("rlme.sampling.begin", lambda m, p: begun.append({len(x) for x in p}) or begin(m, p))
    found = sample(model, PROMPTS, 2, max_new_tokens=6, temperature=0, eos_token_ids=[2])
    assert rlme.decoding._ways[model] == "even"
    assert begun == [{21}, {20}, {13}]
    for prompt, group in zip(PROMPTS, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert [one.ids for one in group] == [expected[0, len(prompt) :].tolist()] * 2


def test_a_head_that_we_do_not_know_is_left_to_the_model():
    """Its logits are wanted whole then; sharing is off, on one sequence already, with nothing to share."""
    model = build(LlamaConfig(**SIZE, **HEADS, **SPECIAL))
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = continuation_logprobs(model, [PROMPTS[0]], [[[7], [8, 9]]])
        logps, entropies = completion_logps(model, PROMPTS, COMPLETIONS, temperature=0.7, compute_entropy=True)
    said = " ".join(str(warning.message) for warning in caught)
    assert "prefixes are not shared" in said
    assert "logits of all positions are held" in said
    with torch.no_grad():
        expected = [whole_logps(model, PROMPTS[0], asked).sum().item() for asked in ([7], [8, 9])]
        logits = model(input_ids=torch.tensor([PROMPTS[3] + COMPLETIONS[3]])).logits[0, len(PROMPTS[3]) - 1 : -1]
    assert found[0] == pytest.approx(expected, abs=1e-4)
    plain = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logps[3, :7], plain.gather(-1, torch.tensor(COMPLETIONS[3])[:, None])[:, 0])
    torch.testing.assert_close(entropies[3, :7], -(plain.exp() * plain).sum(-1))


@pytest.mark.filterwarnings("ignore:.*correct, but")
def test_a_model_that_reads_ahead_is_refused():
    model = build(BertConfig(**SIZE, num_attention_heads=4, max_position_embeddings=128))
    with pytest.raises(InputError, match=r"BertLMHeadModel.*expected a causal language model.*is_decoder=true"):
        continuation_logprobs(model, PROMPTS, [[[7]]] * 4)


@pytest.mark.filterwarnings("ignore:.*correct, but")
@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "minicpm3"])  # the last: keys and values that are latent
def test_a_whole_run(name, tiny_policy_dir, tmp_path):
    model = save(MODELS[name], tiny_policy_dir, tmp_path / "model")
    written = write_config(tmp_path, model, evaluators=["live", "frozen"])
    with pytest.raises(SystemExit) as ended:
        main(["train", str(written)])
    assert ended.value.code == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    assert all(math.isfinite(row["reward"]) for row in read_rollouts(tmp_path / "run"))


def test_activations_that_cannot_be_computed_again(tiny_policy_dir, tmp_path, capsys):
    model = save(MODELS["openai-gpt"], tiny_policy_dir, tmp_path / "model")
    written = write_config(tmp_path, model, train={"gradient_checkpointing": True})
    with pytest.raises(SystemExit) as ended:
        main(["train", str(written)])
    assert ended.value.code == 2
    assert "train.gradient_checkpointing is true, expected false: OpenAIGPT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*correct, but")
@pytest.mark.parametrize("config", [PhimoeConfig, DogeConfig, Qwen2MoeConfig])
def test_a_window_that_only_the_mask_knows_of(config):
    """The first text, on which both ways are compared, is shorter than the window."""
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4} if config is PhimoeConfig else {}
    layers = {"use_sliding_window": True, "max_window_layers": 1} if config is Qwen2MoeConfig else {}
    model = build(config(**SIZE, **HEADS, **SPECIAL, **experts, sliding_window=12, **layers))
    continuation_logprobs(model, [[30, 31, 32, 33, 34]], [[[7], [8]]])
    text = list(range(30, 80))
    found, _ = continuation_logprobs(model, [text], [[[7], [8]]])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)[[7, 8]]
    torch.testing.assert_close(torch.tensor(found[0]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [([5], [6]), ([5], [6, 9]), ([5] * 6, [5, 5, 5])])
def test_texts_without_a_gradient_in_attention_switch_nothing_off(tokens):
    model = build(LlamaConfig(**SIZE, **HEADS, **SPECIAL))
    prompt, completion = tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        completion_logps(model, [prompt] * 2, [completion, completion[:1]])


def test_passes_of_a_model_that_shares_nothing_keep_to_the_budget():
    model = build(BloomConfig(**SIZE, **SPECIAL, n_head=4))
    with pytest.warns(UserWarning, match="correct, but slower"):
        packs = plan_rows(model, [list(range(30, 50))] * 6, [[7, 8, 9]] * 6, 50)
    assert sorted(map(len, packs)) == [2, 2, 2]

"""Every causal language model that transformers knows, made small and random: which path it takes, and whether that is
right.

`python benchmarks/architectures.py` writes docs/models.md: for each architecture that a small configuration can be
made for, the largest difference of a log-probability from single forwards of the whole text, the difference of the
gradient, and whether greedy sampling equals `generate`. `--one NAME` runs one of them and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlme import decoding, forward, scoring, sharing
from rlme.errors import InputError
from rlme.sampling import sample

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
LARGEST = 60_000_000  # parameters: a model above it was not made small
ROUNDING = 1e-3  # nats, in float32
TIMEOUT = 200  # seconds
# What sizes are called in one configuration or another.
SIZES: dict[int, tuple[str, ...]] = {
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "bos_token_id"),
    2: ("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "linear_num_key_heads", "eos_token_id"),
    4: ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers",
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"),
    7: ("sliding_window", "attention_window_size"),
    8: ("head_dim", "kv_channels", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank",
        "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input", "state_size", "mamba_d_state"),
    16: ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "q_lora_rank"),
    32: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"),
    48: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size"),
    101: ("vocab_size", "vocab_size_per_layer_input"),
    256: ("max_position_embeddings", "n_positions"),
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names} | {"pad_token_id": 0}
# What the sizes of some have to agree on, beyond their names.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
        "n_group": 1, "topk_group": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 7},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {
        "hybrid_override_pattern": "M*M-", "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8, "chunk_size": 8,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 8, "num_mem_blocks": 1,
    },
}  # fmt: skip
TEXT_APART = "its text model is an architecture of its own"  # which is measured
TEXT = list(range(30, 51))
PROMPTS = [TEXT, TEXT, TEXT[:20], list(range(60, 73))]
COMPLETIONS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16], [20, 21, 22, 23, 24, 25], [26, 27, 28, 29, 30, 31, 32]]
LABELS = [[7], [8, 9]]


def small_config(name: str) -> PreTrainedConfig:
    """A configuration of a few thousand parameters, every kind of layer in it."""
    kind = CONFIG_MAPPING[name]
    known = kind().get_text_config()
    if type(known) is not kind:
        raise ValueError(TEXT_APART)
    keys = known.to_dict()
    # A sliding window is set where the default has none, too.
    sizes: dict[str, Any] = {
        k: v for k, v in SMALL.items() if keys.get(k) is not None or (k in keys and k == "sliding_window")
    }
    if "num_key_value_heads" in sizes and keys["num_key_value_heads"] == keys.get("num_attention_heads"):
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    kinds = list(dict.fromkeys(keys.get("layer_types") or []))
    if kinds and name not in SPECIAL:
        sizes["layer_types"] = (kinds * 4)[:4]
    config = kind(**(sizes | SPECIAL.get(name, {})))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def small_model(name: str) -> PreTrainedModel:
    """Random weights large enough that every position matters."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(name))
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError("no small configuration of it was found")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25 if parameter.shape[-1] <= 64 else 0.1)
    model.eval()
    if not bool(whole(model, TEXT, [7]).isfinite().all()):
        raise ValueError("its logits are not finite")
    return model


def whole(model: PreTrainedModel, context: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of tokens by one forward over one text."""
    logits = model(input_ids=torch.tensor([context + tokens]), use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(context) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def gradient(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(model: PreTrainedModel) -> dict[str, Any]:
    """What path a model takes, and how far that is from whole forwards."""
    row: dict[str, Any] = {}
    logps, _ = scoring.completion_logps(model, PROMPTS, COMPLETIONS)
    plain = [whole(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    off = max(float((logps[i, : len(x)] - x).detach().abs().max()) for i, x in enumerate(plain))
    ours, expected = gradient(model, logps.sum()), gradient(model, torch.cat(plain).sum())
    norm = sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    row["gradient"] = sum(float((expected[k] - ours[k]).norm()) ** 2 for k in expected) ** 0.5 / norm
    contexts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    judged, _ = scoring.continuation_logprobs(model, contexts, [LABELS] * len(contexts))
    with torch.no_grad():
        for context, values in zip(contexts, judged, strict=True):
            pairs = zip(values, LABELS, strict=True)
            off = max(off, *(abs(v - float(whole(model, context, label).sum())) for v, label in pairs))
    row["difference"] = off
    row["shared"] = all(reason is None for reason in sharing._sharing[model].values())
    row["reason"] = next((reason for reason in sharing._sharing[model].values() if reason), "")
    row["head"] = forward._checked.get(model, True)
    starts = [PROMPTS[0], PROMPTS[3]]
    groups = sample(model, starts, 1, max_new_tokens=12, temperature=0, eos_token_ids=[2])
    row["sampling"] = decoding._ways.get(model, "ours")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    drawn = [one.ids for (one,) in groups]
    try:
        generated = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in starts]
    except Exception:
        generated = []
    likeliest = [most_likely(model, list(p), options["max_new_tokens"]) for p in starts]
    row["greedy"] = "yes" if drawn == generated else "yes, unlike `generate`" if drawn == likeliest else "**no**"
    return row


@torch.no_grad()
def most_likely(model: PreTrainedModel, text: list[int], tokens: int) -> list[int]:
    """The likeliest next token of the whole text, again and again."""
    begin = len(text)
    while len(text) < begin + tokens and text[-1] != 2:
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[begin:]


def run_one(name: str) -> dict[str, Any]:
    """In a process of its own: what some models do to the library stays there."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        row = {"name": name, "skipped": "no small configuration of it ran"}
    said = next((f"{key}: {row[key]}" for key in ("skipped", "refused", "failed") if key in row), row.get("sampling"))
    print(f"{row['name']}: {said}", flush=True)
    return row


def page(rows: list[dict[str, Any]]) -> str:
    """docs/models.md"""
    measured = [row for row in rows if "difference" in row]
    ways = {
        "ours": "prompt once, our attention",
        "padded": "prompt once, the model's attention",
        "even": "prompt once, prompts of one length at a time",
        "whole": "whole texts at each token",
    }
    lines = []
    for row in sorted(measured, key=lambda row: (not row["shared"], list(ways).index(row["sampling"]), row["name"])):
        paths = "shared prefixes" if row["shared"] else "padded" + ("" if row["head"] else ", whole logits")
        right = row["difference"] <= ROUNDING and row["gradient"] <= ROUNDING
        found = f"{row['difference']:.0e}" if right else f"**{row['difference']:.0e}**"
        lines.append(
            f"| `{row['name']}` | {paths} | {ways[row['sampling']]} | {found} | {row['greedy']} | {row['reason']} |"
        )
    sharing = [row for row in measured if row["shared"]]
    wrong = [row["name"] for row in measured if row["difference"] > ROUNDING or row["gradient"] > ROUNDING]
    refused = [row["name"] for row in rows if "refused" in row]
    skipped = [row["name"] for row in rows if TEXT_APART not in row.get("skipped", TEXT_APART)]
    failed = [f"{row['name']} ({row['failed'].split(chr(10))[0][:100]})" for row in rows if "failed" in row]
    named = ", ".join
    ours = sum(row["sampling"] == "ours" for row in sharing)
    return f"""# Which models work

Any causal language model of Hugging Face transformers. Where prefixes can be shared, every prompt, answer and question
is computed once; where they cannot, texts are padded as usual, which is slower and gives the same numbers. Which it is
is found out when a model is first used: both ways are computed on a sample and compared, and a warning names the
reason if they differ or if it is known beforehand that they would. The same holds for the LM head (a model whose
logits are more than its projection keeps its own, whole) and for the cache (where it does not continue rows as whole
texts do, these are read again for each token). `share_prefixes: false` under `train:` turns sharing off.

Written by `python benchmarks/architectures.py` (torch {torch.__version__}, transformers {version("transformers")},
{platform.machine()}, float32): architectures of transformers with small random weights, attention as it comes; of
models with images or sound, the text part. Of {len(measured)} measured, {len(sharing)} share prefixes, {ours} of
them also in sampling. *Difference*: the largest of a log-probability (loss, judging; nats) from a single forward over
the whole text; gradients were compared too. *Greedy*: sampling at temperature 0 equals `generate`; or else, it picks
the likeliest token of the whole text each time, and `generate` does not (for example, it forces a last token for
BART's kin, and counts positions differently from a plain forward for RoBERTa's).

- Log-probabilities or gradients off by more than {ROUNDING:g}: {named(wrong) or "none"}.
- Refused, because logits depend on what follows or on padding: {named(refused) or "none"}.
- Failed here, in transformers or in ours: {"; ".join(failed) or "none"}.
- No small configuration was found for: {named(skipped) or "none"}.

| `model_type` | judging and loss | sampling | difference | greedy | why not shared |
|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="NAME", help="one architecture (a `model_type`), as a line of JSON")
    name = parser.parse_args().one
    if name is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(run_one, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
        PAGE.write_text(page(rows))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model = small_model(name)
    except Exception as error:
        print(json.dumps({"name": name, "skipped": f"{type(error).__name__}: {error}"}))
        return
    try:
        row = measure(model)
    except InputError as error:
        row = {"refused": str(error)}
    except Exception as error:
        row = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name, **row}))


if __name__ == "__main__":
    main()

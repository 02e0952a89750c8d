"""Packed weights of linear layers give what the layers give, in bfloat16 to the last bit, and leave no trace."""

import platform
import weakref
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from rlme import packed_linear
from rlme.packed_linear import packed_linears
from rlme.sampling import sample

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [60, 61, 62], [70]]

# Asked of PyTorch and not of our own check, which these tests are to find broken where it says no for no reason.
ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
needs_float32 = pytest.mark.skipif(not ONEDNN, reason="oneDNN has no products here")
needs_bfloat16 = pytest.mark.skipif(
    not ONEDNN or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 products here"
)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=needs_bfloat16), pytest.param(torch.float32, marks=needs_float32)],
    ids=str,
)


def equal(a, b):
    """bfloat16: to the last bit. float32: but for rounding."""
    return torch.equal(a, b) if a.dtype == torch.bfloat16 else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("rows", [(1,), (32, 1), (4, 112), (0,)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 192, False), (33, 39, True)])
def test_equal_to_linear(rows, inputs, outputs, bias, dtype):
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=bias).to(dtype))
    x = torch.randn(*rows, inputs).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        with packed_linears(layer):
            assert "forward" in vars(layer[0])
            assert equal(layer(x), expected)
            assert layer(x).dtype == dtype
    assert "forward" not in vars(layer[0])


@each_dtype
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)], ids=str)
def test_layers_with_the_same_input_are_one_product(biases, dtype, monkeypatch):
    """Called in any order, with the same input or others; with and without biases they stay apart."""
    shapes = zip(("q_proj", "k_proj", "v_proj"), (96, 32, 64), biases, strict=True)
    layers = nn.ModuleDict({name: nn.Linear(64, width, bias=bias).to(dtype) for name, width, bias in shapes})
    products = []
    multiply = packed_linear._multiply
    monkeypatch.setattr(packed_linear, "_multiply", lambda *args: products.append(1) or multiply(*args))
    x, y = torch.randn(2, 4, 64).to(dtype), torch.randn(3, 64).to(dtype)
    with torch.no_grad():
        calls = [(name, z) for z in (x, y, x) for name in ("v_proj", "q_proj", "k_proj")] + [("q_proj", y)]
        expected = [layers[name](z) for name, z in calls]
        with packed_linears(layers):
            products.clear()
            found = [layers[name](z) for name, z in calls]
        assert len(products) == (4 if len(set(biases)) == 1 else len(calls))
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_float32
def test_layers_of_different_types_stay_apart():
    layers = nn.ModuleDict({"gate_proj": nn.Linear(64, 32), "up_proj": nn.Linear(64, 32).bfloat16()})
    with torch.no_grad(), packed_linears(layers):
        for layer in layers.values():
            assert layer(torch.randn(4, 64).to(layer.weight.dtype)).dtype == layer.weight.dtype


@each_dtype
def test_one_product_holds_nothing_once_all_layers_are_served(dtype):
    layers = nn.ModuleDict({name: nn.Linear(64, 32).to(dtype) for name in ("gate_proj", "up_proj")})
    with torch.no_grad(), packed_linears(layers):
        x = torch.randn(4, 64).to(dtype)
        held = weakref.ref(x)
        for layer in layers.values():
            layer(x)
        del x
        assert held() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_samples_are_the_same(tiny_model_dirs, architecture, lora, dtype, monkeypatch):
    """Tokens and log-probabilities, with biases (Qwen2), tied heads and adapters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[architecture])
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    options = {"max_new_tokens": 20, "eos_token_ids": [2], "dtype": dtype}
    packed = sample(model, PROMPTS, 4, **options)
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr("rlme.sampling.packed_linears", lambda model: nullcontext())
    plain = sample(model, PROMPTS, 4, **options)
    if dtype == torch.bfloat16:
        assert packed == plain
    for some, others in zip(packed, plain, strict=True):
        for a, b in zip(some, others, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_what_is_not_a_plain_layer_in_one_of_two_types_is_left_alone():
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(8, 32).bfloat16()
    hooked.forward = forward = lambda x: x
    model = nn.ModuleList([nn.Linear(8, 32).double(), Own(8, 32).bfloat16(), nn.Linear(8, 31).bfloat16(), hooked])
    with packed_linears(model):
        assert not any("forward" in vars(module) for module in model[:3])
        assert hooked.forward is forward
    assert hooked.forward is forward


@needs_bfloat16
def test_other_types_of_input_are_treated_as_without():
    model = nn.Sequential(nn.Linear(8, 32).bfloat16())
    x = torch.randn(3, 8)
    with torch.no_grad(), packed_linears(model):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)


@needs_float32
def test_float32_layers_compute_in_bfloat16_under_autocast_as_they_do_without():
    model = nn.Sequential(nn.Linear(8, 32))
    x = torch.randn(3, 8)
    with torch.no_grad(), packed_linears(model), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("pack", [None, lambda weight: weight], ids=["missing", "failing"])
def test_without_the_operator_layers_stay_as_they_are(pack, monkeypatch):
    def missing(weight):
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed_linear, "_pack", pack or missing)
    monkeypatch.setattr(packed_linear, "_multiply", lambda x, packed, bias: (x @ packed.T) * 2)
    packed_linear._available.cache_clear()
    try:
        layer = nn.Sequential(nn.Linear(8, 32).bfloat16())
        with packed_linears(layer):
            assert "forward" not in vars(layer[0])
    finally:
        packed_linear._available.cache_clear()

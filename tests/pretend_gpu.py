"""A GPU where there is none, to test what runs where: `build` once, then `pretend` in a process of its own.

PyTorch's CPU build has the keys of CUDA and of Apple's MPS, but nothing behind them; `pretend_gpu.cpp` puts the CPU
there, with a device's rules. What a GPU's own kernels would do (and how fast) this does not tell.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY = 2**34  # bytes that the device says it has


def build(kind: str, folder: Path) -> Path:
    """The library for a `kind` of GPU, cuda or mps; about 8 seconds."""
    compiler = shutil.which("c++")
    spec = importlib.util.find_spec("torch")
    assert compiler and spec and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    library = folder / f"{kind}.so"
    includes = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    links = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    options = ["-w", "-std=c++20", "-shared", "-fPIC", *(["-DAPPLE"] if kind == "mps" else [])]
    subprocess.run([compiler, *options, *includes, str(SOURCE), "-o", str(library), *links], check=True)
    return library


def pretend(kind: str, library: str) -> Any:
    """Let this process have a GPU. Returns a function: how often the host has waited for it."""
    assert "torch" not in sys.modules, "hooks are looked up once, when PyTorch is imported"
    device = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    device.pretend_gpu_waits.restype = ctypes.c_int64
    (_cuda if kind == "cuda" else _mps)()
    return device.pretend_gpu_waits


def _cuda() -> None:
    import torch

    stats = {"allocated_bytes": {"all": {"peak": 0, "current": 0}}}
    for name, answer in {
        "getDeviceCount": 1, "getDevice": 0, "setDevice": None, "exchangeDevice": 0, "maybeExchangeDevice": 0,
        "synchronize": None, "emptyCache": None, "memoryStats": stats, "resetPeakMemoryStats": None,
        "getCurrentRawStream": 0,
    }.items():  # fmt: skip
        setattr(torch._C, f"_cuda_{name}", lambda *_, answer=answer: answer)
    cuda: Any = torch.cuda
    cuda._initialized = True
    cuda.default_generators = (torch.default_generator,)
    cuda._exchange_device = cuda._maybe_exchange_device = lambda _: 0
    cuda._get_device_properties = lambda _: SimpleNamespace(name="pretended", major=9, minor=0, total_memory=MEMORY)
    cuda.get_device_properties = cuda._get_device_properties
    cuda.is_current_stream_capturing = lambda: False

    # Products in float32 of numbers in half precision exist on CUDA alone.
    library = torch.library.Library("aten", "IMPL")

    def addmm(added: Any, a: Any, b: Any, out_dtype: Any, *, beta: float = 1, alpha: float = 1, out: Any) -> Any:
        assert a.dtype == b.dtype != torch.float32
        return out.copy_(torch.addmm(added.float(), a.float(), b.float(), beta=beta, alpha=alpha))

    library.impl("addmm.dtype_out", addmm, "CUDA")
    _cuda.kept = library  # type: ignore[attr-defined]


def _mps() -> None:
    import torch

    aten = torch.ops.aten

    for name, answer in {
        "is_available": True, "is_on_macos_or_newer": True, "get_default_generator": torch.default_generator,
        "deviceSynchronize": None, "emptyCache": None, "currentAllocatedMemory": 0, "driverAllocatedMemory": 0,
        "recommendedMaxMemory": MEMORY,
    }.items():  # fmt: skip
        setattr(torch._C, f"_mps_{name}", lambda *_, answer=answer: answer)
    torch._C._has_mps = True
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: Any = None, enable_gqa: bool = False) -> Any:  # fmt: skip
        """PyTorch's choice of a kernel knows no MPS where it was not built for it."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, **options
        )[0]

    torch.nn.functional.scaled_dot_product_attention = attention

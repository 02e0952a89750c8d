"""Fixtures shared by every test: tiny random models and a tiny trained tokenizer in folders, no network.

Folders (session-scoped, do not write into them):
  tiny_policy_dir    Llama, byte-level BPE with a chat template; "Yes", " Yes", "YES", "No", " No", "NO" and
                     "ø" are one token each
  tiny_base_dir      the same weights, tokenizer without chat template and without pad token (a base model)
  tiny_model_dirs    {"llama", "qwen2", "qwen3", "gemma3"} -> folder, all with the chat tokenizer
  tiny_dir           one of those four, parametrised: a test that takes it runs for every architecture
  tiny_word_dir      Llama with a word-level tokenizer that cannot spell "YES" or "ø" (they become <unk>)
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: tests never touch the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "Is the answer correct? Answer: Yes. Answer: No. Yes\nNo\nYES NO yes no øYESø øNOø Response: øYESø",
    'Does the reply use a list? (Yes or No) Yes No Yes No "Yes" "No" YES. NO. ø ø øYESø øNOø',
    "Natalia sold 48 clips in April, and then she sold half as many clips in May. How many did she sell?",
    "The final answer is \\boxed{72}. user assistant system Question: Reply: Solution: Problem: Evaluation:",
    "How can I get better at cooking rice? Wash the rice, measure the water, and let it rest ten minutes.",
    "First, 1. 2. 3. 4. 5. 6. 7. 8. 9. 0. Score from 0 to 4. Which is better, (a) or (b)? a b A B C D",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two test processes run beside each other, and models this small gain nothing from a second thread."""
    import torch

    torch.set_num_threads(1)


def make_tokenizer(*, chat: bool) -> Any:
    """Byte-level BPE (it can spell any text) trained on CORPUS; without `chat`: no template, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("ø", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    if chat:
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
            model_max_length=1024,
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", model_max_length=1024)


def make_model(architecture: str, tokenizer: Any, seed: int = 0) -> Any:
    """A random float32 model of some 40,000 weights, spread widely enough for attention to matter."""
    import torch
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "attention_dropout": 0.0,
    }
    torch.manual_seed(seed)
    model: Any
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8, tie_word_embeddings=True))
    else:  # two sliding layers around a full one; the window is shorter than any prompt
        shape["num_hidden_layers"] = 3
        config = Gemma3TextConfig(
            **shape,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        )
        model = Gemma3ForCausalLM(config)
    return model.to(torch.float32).eval()


def save_tiny(folder: Path, architecture: str, *, chat: bool, seed: int = 0) -> Path:
    tokenizer = make_tokenizer(chat=chat)
    make_model(architecture, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(root / name, name, chat=True) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def tiny_dir(request: pytest.FixtureRequest, tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs[request.param]


@pytest.fixture(scope="session")
def tiny_policy_dir(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["llama"]


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny-base"), "llama", chat=False)


@pytest.fixture(scope="session")
def tiny_word_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "yes", "no", "is", "the", "answer", "correct", "question", "?", ".", ":"]
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    folder = tmp_path_factory.mktemp("tiny-word")
    make_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The third-party data that lies beside a development checkout; it is not part of the package."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder.name}/ beside the repository")
    return folder

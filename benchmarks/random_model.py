"""A randomly initialised model with the shape of a real one, for timing: speed does not depend on the weights.

    python benchmarks/random_model.py qwen3-0.6b DIR

The tokenizer is the built-in model's, or another folder's (`--tokenizer`). Its vocabulary is smaller than the shape's,
so many of the tokens that the model draws have no text; what a judge reads is as long on every side.
"""

from __future__ import annotations

import argparse

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlme.models import BUILTIN, default_device, load_tokenizer

SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--tokenizer", default=BUILTIN, metavar="MODEL", help="default: the built-in model's")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(options.tokenizer)
    config = Qwen3Config(
        **SHAPES[options.shape],
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with default_device():  # a GPU draws 4 billion weights in a moment
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()

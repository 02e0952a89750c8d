"""The lab's tokenizer: whole words, digits and lengths as single tokens, `ø` a token of its own.

A token carries the space before it, so that decoding is plain concatenation and gives back exactly the text that was
sampled: a run decodes completions and encodes them again for the evaluator.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from rlme.lab.corpus import LONGEST, Drills, Mixture, Weights, draw_document, draw_drill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
PAD, EOS, UNK = range(3)
PATTERN = r"-{9}[A-Z][a-z]+-{9}|\n| ?\\boxed\{| ?YES| ?NO| ?[A-Z]?[a-z]+| \d{1,3}|\d| ?[^\sA-Za-z0-9]|[A-Z]| "
_PATTERN = re.compile(PATTERN)


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Every token of the corpus, found in a fixed sample of it."""
    rng = random.Random(1)
    words = {str(d) for d in range(10)} | {f" {n}" for n in range(LONGEST + 1)}
    for _ in range(4000):
        for document in (draw_document(rng, Mixture(), Weights()), draw_drill(rng, Drills(), Weights())):
            words.update(word for part in document for word in _PATTERN.findall(part.text))
    return {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}


def encode(text: str) -> list[int]:
    """As the saved tokenizer encodes it; for building a corpus without going through text files."""
    known = vocabulary()
    return [known.get(word, UNK) for word in _PATTERN.findall(text)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer to save beside a model; `AutoTokenizer` loads it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True)
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )

"""Control tokens spelled out in an answer: a policy could end its turn there, and write the judge's verdict itself.

An answer that holds the text `<|im_end|>` in ordinary tokens would, inside the prompt of a judge, be read as the token:
tokenizers look for control tokens in all text. So their spelling is broken by a space in what is judged, and in nothing
else: `< |im_end|>`. The policy's own control tokens are left out of its text already.
"""

from __future__ import annotations

import re
from typing import Any

# Of a judge whose tokenizer is not here (an endpoint): the spellings of the families of models in use.
COMMON = re.compile(
    r"<[|｜][^<>|｜\s]{1,60}[|｜]>|<\|\w{1,30}>|<\w{1,30}\|>|\[\|/?\w{1,30}\|\]|</?s>|<(?:bos|eos|pad|unk|mask|sep|cls)>|<(?:start|end)_of_\w{1,20}>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS)\]|<</?SYS>>"
)


def pattern_of(tokenizer: Any) -> re.Pattern[str]:
    """Matches the control tokens of a tokenizer, whatever they look like; words and single characters are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    # Tokenizers look for all added tokens in text; DeepSeek's mark their turns with some that are not called special.
    tokens |= {t.content for t in added if t.special or COMMON.fullmatch(t.content)}
    spelled = sorted((t for t in tokens if len(t) > 2 and not t.isalnum()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")  # the latter matches nothing


def harmless(text: str, evaluator: Any) -> str:
    """`text` from a policy, as this evaluator may read it."""
    pattern: re.Pattern[str] = getattr(evaluator, "control_tokens", COMMON)
    return pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

"""Prompts with references, as the alignment stages use them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlme.align.config import AlignConfig, AlignDataConfig
from rlme.data import build_prompts, load_rows
from rlme.errors import InputError
from rlme.judgement import Message


@dataclass(frozen=True, slots=True)
class AlignPrompt:
    """A prompt (text or chat messages), its references, and the row's columns for questions to show."""

    row: int
    prompt: str | list[Message]
    references: tuple[str, ...]
    columns: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AlignPrompts:
    """Those to train on, those to compare the models on, and sentences on what was dropped."""

    train: list[AlignPrompt]
    held_out: list[AlignPrompt]
    notes: list[str]


def load_prompts(config: AlignConfig, tokenizer: Any) -> AlignPrompts:
    """Read `data.train` and what to compare on.

    Raises:
        InputError: a missing reference column or, unless told to drop it, a row without a reference.
    """
    data = config.data
    notes: list[str] = []
    train = _read(data, data.train, data.split, data.limit, tokenizer, notes, required=True)
    held_out: list[AlignPrompt] = []
    if data.eval is not None:
        held_out = _read(data, data.eval, data.eval_split, data.eval_limit, tokenizer, notes, required=False)
        learned = {json.dumps(prompt.prompt) for prompt in train}
        if again := sum(json.dumps(prompt.prompt) in learned for prompt in held_out):
            notes.append(f"{data.eval}: {again} of {len(held_out)} prompts are also trained on, so not held out")
    elif data.hold_out:
        if data.hold_out >= len(train):
            raise InputError(f"data.hold_out is {data.hold_out}, but there are only {len(train)} prompts.")
        train, held_out = train[: -data.hold_out], train[-data.hold_out :]
    return AlignPrompts(train, held_out, notes)


def _read(
    data: AlignDataConfig,
    source: str,
    split: str,
    limit: int | None,
    tokenizer: Any,
    notes: list[str],
    *,
    required: bool,
) -> list[AlignPrompt]:
    rows = load_rows(source, split=split, name=data.name, limit=limit)
    if required and data.reference not in rows.columns:
        raise InputError(
            f"{source}: no column {data.reference!r} with reference outputs (data.reference); "
            f"its columns are {', '.join(rows.columns)}."
        )
    prompts = build_prompts(
        rows,
        prompt=data.prompt,
        system=data.system,
        tokenizer=tokenizer,
        chat=data.chat,
        max_prompt_tokens=data.max_prompt_tokens,
    )
    notes.extend(prompts.report.sentences())
    found: list[AlignPrompt] = []
    dropped = 0
    for prompt in prompts.prompts:
        references = reference_texts(prompt.columns.get(data.reference))
        if required and not references:
            if data.without_reference == "refuse":
                raise InputError(
                    f"{source}, row {prompt.row}: the reference (column {data.reference!r}) is missing or empty; "
                    "mend the row, or set data.without_reference: drop."
                )
            dropped += 1
            continue
        found.append(AlignPrompt(prompt.row, prompt.prompt, references, prompt.columns))  # type: ignore[arg-type]
    if dropped:
        notes.append(f"{dropped} without a reference, dropped")
    if not found:
        raise InputError(f"{source}: no row has a reference (column {data.reference!r}).")
    return found


def reference_texts(value: Any) -> tuple[str, ...]:
    """The references in a cell: one text or a list of them; empty ones do not count."""
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    numbers = (str(v) if isinstance(v, int | float) and not isinstance(v, bool) and v == v else v for v in values)
    return tuple(v for v in numbers if isinstance(v, str) and v.strip())


def encode_prompt(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """Token ids that a model continues."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_whole(tokenizer: Any, prompt: str | list[Message], answer: str) -> list[int]:
    """Token ids of prompt and answer as training sees them."""
    if isinstance(prompt, str):
        return [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    turns = [*prompt, Message(role="assistant", content=answer)]
    return list(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"])

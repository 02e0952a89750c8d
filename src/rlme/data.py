"""Prompts in: rows from a file or a hub dataset, then prompts (chat or plain) with their gold answers.

Nothing is dropped or merged without being counted in the `Report`, and no prompt is ever cut.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlme.errors import InputError
from rlme.rows import Rows, load_rows
from rlme.templating import check_variables, nearest, render, undeclared
from rlme.verify import check_method, extract_answer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Messages", "Prompt", "PromptSet", "Report", "Rows", "build_prompts", "load_rows"]

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its place in the set, from 0.
        row: its line or row in the source, from 1.
        prompt: text, or chat messages that end with a user's.
        gold: the known answer, or None.
        columns: the row without the columns that gold is made from: all that an evaluation template may see.
    """

    index: int
    row: int
    prompt: str | Messages
    gold: str | None
    columns: dict[str, Any]


@dataclass
class Report:
    """What became of the rows; every list holds row numbers of the source."""

    source: str
    rows: int
    kept: int = 0
    empty: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    without_gold: list[int] = field(default_factory=list)
    trained_on: list[int] = field(default_factory=list)
    longest_tokens: int | None = None

    def sentences(self) -> list[str]:
        """One line per thing worth knowing, for the terminal; the first says how many prompts there are."""
        lines = [f"{self.kept} prompts from {self.rows} rows of {self.source}"]
        if self.longest_tokens is not None:
            lines[0] += f" (the longest: {self.longest_tokens} tokens)"
        for rows, what in (
            (self.empty, "empty, dropped"),
            (self.duplicates, "duplicate, kept once"),
            (self.too_long, "longer than the limit, dropped"),
            (self.without_gold, "without a gold answer"),
            (self.trained_on, "also trained on, so not held out"),
        ):
            if rows:
                lines.append(f"{len(rows)} {what} ({_some_rows(rows)})")
        return lines


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the report on how they came about.

    Attributes:
        gold_columns: the columns that gold is made from; `Prompt.columns` lacks them.
    """

    prompts: list[Prompt]
    gold_columns: tuple[str, ...]
    report: Report

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """sha256 (hex) over prompts, gold and columns: another for any other set."""
        told = [[prompt.prompt, prompt.gold, prompt.columns] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()

    def require_gold(self) -> None:
        """InputError if any prompt has no gold answer (a verifiable reward and anchors need all of them)."""
        missing = [prompt.row for prompt in self.prompts if prompt.gold is None]
        if missing:
            raise InputError(
                f"{self.report.source}: {len(missing)} of {len(self.prompts)} prompts have no gold answer "
                f"({_some_rows(missing)}), and this configuration needs one for each."
            )

    def to_dataset(self) -> "Dataset":
        """Columns: prompt (text or messages), gold (text or null), prompt_index, columns (JSON as text)."""
        from datasets import Dataset, Features, Value

        text = Value("string")
        chat = not isinstance(self.prompts[0].prompt, str)
        features = Features(
            {
                "prompt": [{"role": text, "content": text}] if chat else text,
                "gold": text,
                "prompt_index": Value("int64"),
                "columns": text,
            }
        )
        return Dataset.from_list(
            [
                {
                    "prompt": prompt.prompt,
                    "gold": prompt.gold,
                    "prompt_index": prompt.index,
                    "columns": json.dumps(prompt.columns, ensure_ascii=False, default=str),
                }
                for prompt in self.prompts
            ],
            features=features,
        )


def build_prompts(
    rows: Rows,
    *,
    prompt: str,
    system: str | None = None,
    answer: str | None = None,
    answer_from: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    chat: bool | None = None,
    max_prompt_tokens: int | None = None,
) -> PromptSet:
    """Prompts from rows, in their order; the same rows and arguments always give the same set.

    Args:
        rows: from `load_rows`.
        prompt: the name of a column with text or chat messages, or a Jinja template over the columns.
        system: a system message; plain text begins with it; messages that have their own keep that.
        answer: gold: the name of a column, or a Jinja template over the columns.
        answer_from: how to find the answer in it (`verify.extract_answer`); None takes it as it is,
            as does "auto" where nothing is boxed or follows ####.
        tokenizer: of the policy; needed for `chat` and for `max_prompt_tokens`.
        chat: prompts as chat messages; None: if the tokenizer has a chat template.
        max_prompt_tokens: longer prompts (counted with the chat template) are dropped and reported.

    Raises:
        InputError: an unknown column or template variable; chat messages or `chat` without a chat template;
            values that are no text; gold asked for and nowhere found; nothing left.
    """
    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if chat and not has_template:
        raise InputError("data: chat prompts need a tokenizer with a chat template, and this one has none.")
    chat = has_template if chat is None else chat
    if answer_from is not None:
        check_method(answer_from)
    used = _columns_of(prompt, rows, "data.prompt")
    gold_columns = _columns_of(answer, rows, "data.answer") if answer is not None else ()

    report = Report(source=rows.source, rows=len(rows.records))
    found: list[tuple[int, str | Messages, dict[str, Any]]] = []
    seen: set[str] = set()
    for number, record in zip(rows.numbers, rows.records, strict=True):
        where = f"{rows.source}, row {number}"
        built = _prompt(record, prompt, used, system, chat, where)
        if built is None:
            report.empty.append(number)
            continue
        key = built if isinstance(built, str) else json.dumps(built, sort_keys=True)
        if key in seen:
            report.duplicates.append(number)
            continue
        seen.add(key)
        found.append((number, built, record))

    lengths = _token_counts([built for _, built, _ in found], tokenizer, chat, max_prompt_tokens)
    prompts: list[Prompt] = []
    for (number, built, record), length in zip(found, lengths, strict=True):
        if max_prompt_tokens is not None and length > max_prompt_tokens:
            report.too_long.append(number)
            continue
        gold = None
        if answer is not None:
            gold = gold_answer(record, answer, answer_from, f"{rows.source}, row {number}")
            if gold is None:
                report.without_gold.append(number)
        columns = {name: value for name, value in record.items() if name not in gold_columns}
        prompts.append(Prompt(len(prompts), number, built, gold, columns))
    report.kept = len(prompts)
    if max_prompt_tokens is not None:
        report.longest_tokens = max((n for n in lengths if n <= max_prompt_tokens), default=None)
    if not prompts:
        raise InputError(f"no prompts are left: {'; '.join(report.sentences())}.")
    if answer is not None and len(report.without_gold) == len(prompts):
        raise InputError(
            f"{rows.source}: data.answer {answer!r} gives no gold answer for any row"
            + (f" (looked for {answer_from!r})" if answer_from else "")
            + (f" that is kept: {'; '.join(report.sentences())}." if len(prompts) < report.rows else ".")
        )
    return PromptSet(prompts, gold_columns, report)


def _some_rows(rows: list[int]) -> str:
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)}"


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _columns_of(text: str, rows: Rows, where: str) -> tuple[str, ...]:
    """The columns that a column name or template reads; InputError if there is no such column."""
    if text in rows.columns:
        return (text,)
    if not _is_template(text):
        raise InputError(
            f"{where}: {rows.source} has no column {text!r}{nearest(text, rows.columns)}; "
            f"its columns: {', '.join(rows.columns)}."
        )
    check_variables(text, rows.columns, where=where)
    return tuple(sorted(undeclared(text, where=where)))


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def _prompt(
    record: Mapping[str, Any], prompt: str, used: tuple[str, ...], system: str | None, chat: bool, where: str
) -> str | Messages | None:
    """The prompt of one row; None when there is nothing in it."""
    if used and all(_blank(record[column]) for column in used):
        return None
    value = record[prompt] if prompt in record else render(prompt, record, where="data.prompt")
    if isinstance(value, list):
        messages = _messages(value, f"{where}: column {prompt!r}")
        if not chat:
            raise InputError(f"{where}: chat messages need a tokenizer with a chat template.")
        if _blank(messages[-1]["content"]):
            return None
    elif isinstance(value, str):
        if not value.strip():
            return None
        if not chat:
            return f"{system}\n\n{value}" if system else value
        messages = [{"role": "user", "content": value}]
    else:
        raise InputError(f"{where}: column {prompt!r} holds {type(value).__name__}; expected text or chat messages.")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _messages(value: list[Any], where: str) -> Messages:
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise InputError(f"{where}: a chat message needs a text under 'role' and one under 'content'.")
    if value[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's; a prompt ends with the user's.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def gold_answer(record: Mapping[str, Any], answer: str, method: str | None, where: str) -> str | None:
    value = record[answer] if answer in record else render(answer, record, where="data.answer")
    if value is None or value != value:  # NaN is what a float column has for nothing
        return None
    if not isinstance(value, (str, int, float)):
        raise InputError(f"{where}: column {answer!r} holds {type(value).__name__}, not text or a number.")
    text = str(value).strip()
    if method is None:
        return text or None
    if method == "auto":  # a column with just the answer: "Apollo 11" is not to become 11
        return extract_answer(text, "boxed") or extract_answer(text, "####") or text or None
    return extract_answer(text, method)


def _token_counts(
    prompts: list[str | Messages],
    tokenizer: "PreTrainedTokenizerBase | None",
    chat: bool,
    limit: int | None,
) -> list[int]:
    """Tokens of every prompt as the policy will see it, generation prompt included; zeros without a limit."""
    if tokenizer is None and limit is not None:
        raise InputError("data.max_prompt_tokens needs a tokenizer to count with.")
    if tokenizer is None or not prompts:
        return [0] * len(prompts)
    texts: list[str] = []
    for prompt in prompts if limit is not None else prompts[:1]:  # one: a chat may be refused
        if isinstance(prompt, str):
            texts.append(prompt)
            continue
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # raised by the model's own template
            roles = ", ".join(message["role"] for message in prompt)
            raise InputError(f"data: the chat template refuses messages with the roles {roles} ({error}).") from None
        texts.append(str(text))
    if limit is None:
        return [0] * len(prompts)
    ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    return [len(each) for each in ids]

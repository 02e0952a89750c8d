"""The configuration of `rlme judge-bench`. Imports without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rlme.config import EvaluatorConfig, JudgingConfig, QuestionConfig, Section, evaluator_list, named_questions


class SetConfig(Section):
    """A set of labelled items."""

    source: str = Field(min_length=1)
    """File (.jsonl, .json, .csv, .parquet) or hub dataset id."""
    format: str = "pairs"
    """pairs | llmbar | mtbench: two outputs and which is better. points | gsm8k: an answer and whether it is right."""
    name: str | None = None
    """Name in tables. Default: the file's stem."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field -> column, where the format's own names do not fit: {instruction: prompt, label: winner}."""
    labels: list[Any] | None = None
    """How the labels are spelled, the first (or right) one first. Default: recognised."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = Field(None, ge=1)
    """Only the first rows."""


def _sets(value: Any) -> Any:
    """`FORMAT:SOURCE` or `SOURCE` is short for the mapping."""
    if not isinstance(value, list):
        value = [value]
    return [parse_set(item) if isinstance(item, str) else item for item in value]


def parse_set(text: str) -> dict[str, str]:
    """`llmbar:natural.jsonl` -> {format: llmbar, source: natural.jsonl}; without a format: pairs."""
    head, colon, tail = text.partition(":")
    return {"format": head, "source": tail} if colon and "/" not in head and "." not in head else {"source": text}


class BenchConfig(Section):
    """A run of `rlme judge-bench`."""

    judges: Annotated[list[EvaluatorConfig], BeforeValidator(evaluator_list)] = Field(default_factory=list)
    """Models or endpoints: a name, or {model, name, style, ...}, or {endpoint: {...}}."""
    sets: Annotated[list[SetConfig], BeforeValidator(_sets)] = Field(default_factory=list)
    """What they are measured on."""
    protocols: list[str] = Field(default_factory=lambda: ["base"])
    """For pairs: base, refeval, refmatch, vanilla, cot, reference, href, or a file with your own."""
    questions: Annotated[dict[str, QuestionConfig], BeforeValidator(named_questions)] = Field(default_factory=dict)
    """For single answers: questions as in `rlme train`."""
    judging: JudgingConfig = JudgingConfig()
    """Template and read-out of the questions."""
    vote: bool = False
    """With several references: one vote each instead of the mean of the probabilities."""
    max_tokens: int | None = Field(None, ge=64)
    """Longest pairwise prompt in the judge's tokens. Default: what the judge accepts."""
    too_long: Literal["shorten", "refuse"] = "shorten"
    """Longer ones: cut outputs and reference at their end, all to one length; or count a failure."""
    critique_tokens: int = Field(256, ge=1)
    """Longest reasoning of protocols that reason first."""
    wrong_references: bool = True
    """Ask protocols with a reference twice more: with another item's reference, and with the worse output as one."""
    resamples: int = Field(1000, ge=0)
    """Bootstrap resamples behind the intervals."""
    seed: int = Field(0, ge=0)
    """Seeds bootstrap and exchanged references."""
    output: str | None = None
    """Folder for report.md, report.html, results.json and verdicts.jsonl."""

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.judges:
            raise ValueError("`judges` is empty: name at least one model or endpoint")
        if not self.sets:
            raise ValueError("`sets` is empty: name at least one file of labelled items")
        return self

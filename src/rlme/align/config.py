"""The configuration of `rlme align`. Imports without torch. Defaults are the settings of arXiv 2602.16802 and its code
where they are known (`docs/align.md` lists which are not)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rlme.config import (
    EvaluatorConfig,
    JudgingConfig,
    LoraConfig,
    ModelConfig,
    PairwiseConfig,
    QuestionConfig,
    Section,
    evaluator_list,
    named_questions,
    short_for,
)

Evaluators = Annotated[list[EvaluatorConfig], BeforeValidator(evaluator_list)]
Questions = Annotated[dict[str, QuestionConfig], BeforeValidator(named_questions)]


class AlignDataConfig(Section):
    """Prompts and their reference outputs."""

    train: str = Field(min_length=1)
    """File (.jsonl, .json, .csv, .parquet) or hub dataset id."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    eval: str | None = None
    """Prompts on which the models are compared in the end. Default: those held out by `hold_out`."""
    eval_split: str = "test"
    """Split of a hub dataset to compare on."""
    prompt: str = "prompt"
    """A column (text or chat messages), or a Jinja template over the columns."""
    reference: str = "reference"
    """The column with the reference output, or a list of them."""
    without_reference: Literal["refuse", "drop"] = "refuse"
    """A row without a reference: an error that names it, or dropped and counted."""
    system: str | None = None
    """System message put before chat prompts."""
    chat: bool | None = None
    """Ask through the chat template. Default: when the tokenizer has one."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are dropped and counted, never cut."""
    hold_out: int = Field(0, ge=0)
    """Keep so many of the last prompts out of training and compare the models on them."""
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""
    eval_limit: int | None = Field(200, ge=1)
    """Compare on only the first rows of `eval`."""


class OptimConfig(Section):
    """What the two training stages share."""

    epochs: float = Field(1, gt=0)
    """Passes over the data."""
    batch_size: int = Field(64, ge=1)
    """Examples (for dpo: pairs) in one update."""
    device_batch_size: int = Field(1, ge=1)
    """Of these, how many at a time on the device; the rest is gradient accumulation."""
    max_tokens: int = Field(2048, ge=16)
    """Longest prompt and answer together; longer ones are left out and counted."""
    checkpoint_every: int = Field(200, ge=1)
    """Updates between checkpoints; a stopped stage resumes from the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """Any other argument of TRL's SFTConfig or DPOConfig: optim, report_to, ..."""

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.batch_size > self.device_batch_size and self.batch_size % self.device_batch_size:
            raise ValueError(
                f"device_batch_size is {self.device_batch_size}, expected a divisor of batch_size, which is "
                f"{self.batch_size}"
            )
        return self


class SFTStage(OptimConfig):
    """Fine-tuning on the references; the loss is on the answer only."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak; linear decay after `warmup`."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the updates."""
    epochs: float = Field(2, gt=0)
    """Passes over the data."""
    batch_size: int = Field(128, ge=1)
    """Examples in one update."""


class SampleStage(Section):
    """On-policy answers."""

    n: int = Field(5, ge=2)
    """Candidates of each prompt."""
    temperature: float = Field(0.8, gt=0)
    """Sampling temperature."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling."""
    max_tokens: int = Field(2048, ge=1)
    """Longest answer; longer ones are cut off there and counted."""
    prompts_at_once: int = Field(8, ge=1)
    """Prompts whose answers are written together; also what is redone after an interruption."""


class JudgeStage(PairwiseConfig):
    """Who compares the candidates, and how."""

    evaluators: Evaluators = Field(default_factory=lambda: [EvaluatorConfig(model="live")])
    """live: the model that wrote them. frozen: the model after sft. Or others and endpoints, as in `rlme train`."""
    questions: Questions = Field(default_factory=dict)
    """Instead of comparing pairs: score every candidate by weighted questions, as in `rlme train`."""
    judging: JudgingConfig = JudgingConfig()
    """Template and read-out of the questions."""
    max_failure_rate: float = Field(0.2, ge=0, le=1)
    """Stop when a larger share of the candidates has no score."""


class PairsStage(Section):
    """Best against worst."""

    min_margin: float = Field(0.0, ge=0)
    """Smallest difference of the two scores."""


class DPOStage(OptimConfig):
    """Direct preference optimisation (sigmoid), against the model that wrote the candidates."""

    beta: float = Field(0.05, gt=0)
    """Strength of the pull back to the starting model. The paper searched 0.005 to 0.2."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak; cosine decay after `warmup`."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the updates."""


class CompareStage(Section):
    """The models of the run against each other."""

    protocol: str | None = None
    """Default: the judge's; `base` where the prompts have no references."""
    evaluators: Evaluators = Field(default_factory=list)
    """Default: the judge's. live and frozen both mean the model after sft here, one judge for all models."""
    also: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], str] = Field(default_factory=dict)
    """Further models to compare with, name -> model, e.g. the result of another run."""
    temperature: float = Field(0.0, ge=0)
    """Of the answers; 0: greedy."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer. Default: as in `sample`."""
    resamples: int = Field(1000, ge=0)
    """Bootstrap resamples behind the intervals."""


class AlignConfig(Section):
    """A run of `rlme align`."""

    model: Annotated[ModelConfig, short_for("path")]
    """The model to align."""
    data: Annotated[AlignDataConfig, short_for("train")]
    """Prompts with references."""
    sft: SFTStage | None = SFTStage()
    """null: start from the model as it is."""
    sample: SampleStage = SampleStage()
    """On-policy answers."""
    judge: JudgeStage = JudgeStage()
    """Scores for them."""
    pairs: PairsStage = PairsStage()
    """Preference pairs."""
    dpo: DPOStage = DPOStage()
    """Training on them."""
    compare: CompareStage | None = CompareStage()
    """Win rates in the end; null: none."""
    rounds: int = Field(1, ge=1)
    """How often sample, judge, pairs and dpo are done, each time from the model before."""
    lora: LoraConfig | None = None
    """Train adapters (merged after each stage) instead of all weights."""
    token_budget: int = Field(8192, ge=64)
    """Tokens in one forward pass of judging: bounds the memory, changes no result."""
    seed: int = Field(0, ge=0)
    """Seeds training order, sampling and random schedules."""
    output: str = "runs/align"
    """The run's folder. Finished stages in it are skipped if their inputs have not changed."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.judge.evaluators:
            raise ValueError("judge.evaluators is empty: give at least one, e.g. [live]")
        if self.data.eval and self.data.hold_out:
            raise ValueError("data.eval and data.hold_out are both set: the final comparison takes one of them")
        compare = self.compare or CompareStage()
        if taken := next((name for name in compare.also if name in self.own_models), None):
            raise ValueError(f"compare.also: the name {taken!r} is taken by a model of this run; choose another")
        for where, judges, pairs in (
            ("judge", self.judge.evaluators, not self.judge.questions),
            ("compare", compare.evaluators or self.judge.evaluators, self.compare is not None),
        ):
            names = [judge.label for judge in judges]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{where}.evaluators: two are called {twice!r}; give one of them another `name`")
            if pairs and (idle := next((judge.label for judge in judges if judge.weight == 0), None)):
                raise ValueError(f"{where}.evaluators: the weight of {idle!r} is 0, expected more to compare pairs")
        if self.judge.questions and not any(q.weight for q in self.judge.questions.values()):
            raise ValueError("judge.questions: all weights are 0, so every candidate would score the same")
        if self.judge.questions and not any(judge.weight != 0 for judge in self.judge.evaluators):
            raise ValueError("judge.evaluators: all weights are 0, so every candidate would score the same")
        return self

    @property
    def own_models(self) -> list[str]:
        """The models that are compared in the end, `also` apart: base, sft, and dpo or, of several rounds, dpo-N."""
        rounds = ["dpo"] if self.rounds == 1 else [f"dpo-{n}" for n in range(1, self.rounds + 1)]
        return ["base", *(["sft"] if self.sft else []), *rounds]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output)

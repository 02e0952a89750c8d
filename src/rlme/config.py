"""The configuration file: every section a documented model, unknown keys rejected. Imports without torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rlme.evaluators.endpoint_config import EndpointConfig


class Section(BaseModel):
    """A mapping in the file: closed (a misspelt key is an error), documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


def short_for(field: str) -> BeforeValidator:
    """Accept the bare value of `field` where a mapping is expected: `model: gpt2` for `model: {path: gpt2}`."""
    return BeforeValidator(lambda value: value if isinstance(value, dict | BaseModel) else {field: value})


def _word(value: Any) -> Any:
    """YAML 1.1 reads a bare YES or NO as a boolean; give the word back."""
    return {True: "YES", False: "NO"}.get(value, value) if isinstance(value, bool) else value


def _words(values: Any) -> Any:
    return [_word(value) for value in values] if isinstance(values, list) else values


class ModelConfig(Section):
    """The policy: the model that is trained."""

    path: str = Field(min_length=1)
    """Hub id, local folder, .gguf file, or `builtin:smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the stored weights. Full fine-tuning wants float32; with LoRA, bfloat16 halves the memory."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub model. Never done unless asked for."""


class LoraConfig(Section):
    """Train a low-rank adapter instead of all weights."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Module names to adapt, or `all-linear`."""


class DataConfig(Section):
    """Where prompts come from, and (optionally) the known answers kept for measuring."""

    train: str = Field(min_length=1)
    """File of prompts (.jsonl, .json, .csv, .parquet) or hub dataset id."""
    eval: str | None = None
    """Held-out prompts, measured every `train.eval_every` steps. Never trained on."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    eval_split: str = "test"
    """Split of a hub dataset to measure on."""
    prompt: str = "prompt"
    """A column (text or a list of chat messages), or a Jinja template over the columns, e.g. `"{{ question }}"`."""
    system: str | None = None
    """System message put before chat prompts."""
    chat: bool | None = None
    """Ask through the chat template. Default: when the tokenizer has one."""
    answer: str | None = None
    """Gold: the column with the known answer. It is only measured, unless `reward` says rlvr or anchor."""
    answer_format: str = "auto"
    """How the answer is read from the gold column: auto (boxed, else ####, else all of it) | boxed | #### | last_number
    | text | regex:PATTERN."""
    completion_format: str | None = None
    """How a completion's answer is read (same choices; auto: boxed, else ####, else the last number). Default: auto
    when there is gold, else not at all."""
    compare: Literal["math", "exact"] = "math"
    """How the two are compared: as mathematics (math-verify), or exactly after removing case and punctuation."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are dropped and counted, never cut."""
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""
    eval_limit: int | None = Field(200, ge=1)
    """Measure on only the first held-out rows."""


Readout = Literal["auto", "marker", "yes_no", "scale", "reason"]


class TemplateConfig(Section):
    """An evaluation template of your own."""

    kind: Literal["text", "turn", "message"]
    """text: the whole context as text to continue. turn: the user's next turn after prompt and completion (chat).
    message: one user message that contains everything (chat)."""
    text: str = Field(min_length=1)
    """Jinja. Sees prompt, completion, context, answer, n_chars, n_words, n_tokens, question, reply_format, anchor,
    previous (questions already answered, in joint mode), and every data column except gold."""


Template = str | TemplateConfig


class QuestionConfig(Section):
    """One meta-question."""

    ask: str = Field(min_length=1)
    """The question in plain language. May use the template's variables: `{{ n_chars }}`, `{{ reference }}`, ..."""
    weight: float = 1.0
    """w_k of equation 3. 0: asked and shown, but not part of the reward."""
    target: Annotated[str, BeforeValidator(_word)] = "YES"
    """The answer whose log-probability is the score: YES or NO, or one of `labels`."""
    labels: Annotated[list[str], BeforeValidator(_words)] = []
    """Answers to choose from, in place of YES and NO: two or more, such as `[good, fair, poor]`. Not for `scale`."""
    template: Template | None = None
    """Overrides `judging.template` for this question."""
    readout: Readout | None = None
    """Overrides `judging.readout` for this question."""


class JudgingConfig(Section):
    """How questions are asked."""

    template: Template = "auto"
    """paper (the policy's own text continued) | reply (a short text with the reply quoted) | chat (the next turn of the
    conversation) | judge (one message with everything) | a Jinja text | {kind, text}. auto: chat for evaluators with a
    chat template, paper for the others."""
    readout: Readout = "auto"
    """marker: log p(YESø) after a prefilled ø, not renormalised (the paper). yes_no: log of P(yes)/(P(yes)+P(no)).
    scale: expected rating 0-4. reason: write a critique first, then `reason_then`. auto: marker for text, yes_no for
    chat."""
    joint: bool = False
    """Ask all questions in one block, each after the target answers of those before (the paper's two-question run)."""
    reason_tokens: int = Field(128, ge=1)
    """Longest critique of the `reason` read-out, in tokens."""
    reason_then: Literal["marker", "yes_no", "scale"] = "yes_no"
    """What is read after the critique."""
    max_context_tokens: int | None = Field(None, ge=16)
    """Longest context an evaluator is given; a longer one is a failed judgement, never cut. Default: its own limit.
    Not for an endpoint that keeps its tokenizer to itself."""
    cache: str | None = None
    """SQLite file that keeps judgements by model, template and exact text, shared by runs and processes. Never used for
    the live policy, nor for a frozen one whose adapter is switched off."""
    cache_mb: int = Field(1024, ge=1)
    """Size of that file, in MiB; the least recently used answers go first."""
    mass_warning: float = Field(0.5, ge=0, le=1)
    """Warn when the mean probability on all labels together is below this."""


class EvaluatorConfig(Section):
    """A model that answers the questions."""

    model: str | None = None
    """live (the policy's current weights) | frozen (its weights at step 0) | hub id | folder | .gguf | builtin:NAME."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible server instead of a model in this process."""
    name: str | None = None
    """Name in metrics and reports. Default: from the model."""
    weight: float | None = Field(None, ge=0)
    """v_j of equation 3. Default: 1 / (number of evaluators without a weight), so that an ensemble is a mean.
    0: asked and shown (held out), but not part of the reward."""
    style: Literal["auto", "chat", "completion"] = "auto"
    """Ask through the chat template or by text to continue. auto: chat when the tokenizer has a template."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the evaluator's weights. auto: bfloat16 on a CUDA GPU, else float32."""
    load_in_4bit: bool = False
    """NF4 quantisation through bitsandbytes (needs a GPU)."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub model. Never done unless asked for."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("an evaluator needs exactly one of `model` and `endpoint`")
        near = difflib.get_close_matches(self.model or "", ("live", "frozen"), n=1, cutoff=0.75)
        if near and self.model != near[0] and not Path(self.model or "").exists():
            raise ValueError(f"evaluator {self.model!r}: did you mean {near[0]!r}?")
        return self

    @property
    def label(self) -> str:
        """The name used in metrics."""
        source = self.model if self.model is not None else self.endpoint.model if self.endpoint else ""
        return self.name or (source or "evaluator").rstrip("/").removesuffix(".gguf").split("/")[-1].split(":")[-1]


def evaluator_weights(evaluators: Sequence[EvaluatorConfig]) -> list[float]:
    """v_j of equation 3; evaluators without a weight share 1 equally."""
    open_ = sum(e.weight is None for e in evaluators)
    return [1 / open_ if e.weight is None else e.weight for e in evaluators]


class PairwiseConfig(Section):
    """How completions of one prompt are compared with each other."""

    protocol: str = "refeval"
    """base, refeval, refmatch, vanilla, cot, reference, href, or a file with your own."""
    schedule: Literal["ordered", "unordered", "tournament"] = "ordered"
    """ordered: every pair in both orders (20 calls for n = 5). unordered: every pair once, in a random order (10).
    tournament: knock-out for the best and the worst, both orders (12)."""
    vote: bool = False
    """With several references: one vote each instead of the mean of the probabilities."""
    max_tokens: int | None = Field(None, ge=64)
    """Longest judge prompt. Default: what the evaluator accepts."""
    too_long: Literal["shorten", "refuse"] = "shorten"
    """Longer ones: cut outputs and reference at their end, all to one length; or count a failure."""
    critique_tokens: int = Field(256, ge=1)
    """Longest reasoning of protocols that reason first."""


class PairwiseRewardConfig(PairwiseConfig):
    """The comparisons behind the reward of mode pairwise."""

    reference: str = "reference"
    """Data column with the reference output, or a list of them, for protocols that show one."""


class RewardConfig(Section):
    """How judgements (and gold) become one number."""

    mode: Literal["rlme", "rlvr", "rlvr+rlme", "pairwise"] = "rlme"
    """rlme: equation 3. rlvr: 1 if the answer is right, else 0. rlvr+rlme: both. pairwise: the mean soft win rate
    against the other completions of the group, by a pairwise judge; no questions are asked."""
    pairwise: PairwiseRewardConfig | None = None
    """Protocol and schedule of mode pairwise."""
    combine: Literal["normalized", "sum"] = "normalized"
    """rlvr+rlme: each part to mean 0, std 1 within the batch, then added (the paper's Tables 1-2); or plainly added."""
    rlvr_weight: float = 1.0
    """Weight of the verifiable part in rlvr+rlme."""
    rlme_weight: float = 1.0
    """Weight of the judged part in rlvr+rlme."""
    anchor: float = Field(0.0, ge=0, le=1)
    """Fraction of the prompts (fixed, seeded) whose true answer is shown to the evaluator."""
    max_failure_rate: float = Field(0.2, ge=0, le=1)
    """Stop, with the state saved, when a larger share of a step's completions has no reward."""


class TrainConfig(Section):
    """The loop: how much, how fast, and how completions are sampled."""

    steps: int = Field(100, ge=0)
    """Updates."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts sampled for each update."""
    group_size: int = Field(6, ge=2)
    """Completions of each prompt (G); the group's mean reward is the baseline, so at least 2."""
    learning_rate: float = Field(2e-6, gt=0)
    """Constant unless `trl.lr_scheduler_type` says otherwise. 2e-6 suits full fine-tuning, 1e-4 LoRA."""
    max_completion_tokens: int = Field(512, ge=1)
    """Longest completion; longer ones are cut off there and counted."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0: off."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than min_p times the most likely one; 0: off."""
    repetition_penalty: float = Field(1.0, gt=0)
    """1: off."""
    stop: list[str] = []
    """A completion ends after any of these texts."""
    loss: Literal["cispo", "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo"] = "cispo"
    """Policy loss, by TRL's names."""
    clip: float | None = Field(None, gt=0)
    """CISPO: absolute upper bound on the importance ratio, default 5.0. Other losses: TRL's epsilon, default 0.2."""
    ratio: Literal["sequence", "token"] = "sequence"
    """Level of the importance ratio."""
    updates_per_batch: int = Field(1, ge=1)
    """Passes over each sampled batch (TRL's num_iterations)."""
    kl: float = Field(0.0, ge=0)
    """Weight of the KL to the starting model (TRL's beta); 0 needs no reference model."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of sampling, judging by the policy, and the loss (weights and optimiser stay as they are). auto:
    bfloat16 where the hardware has it (CUDA GPUs, CPUs with AVX512-BF16), else float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    share_prefixes: bool = True
    """Compute shared prompt and answer tokens once (checked against the plain path at the first use)."""
    token_budget: int | None = Field(None, ge=64)
    """Tokens in one forward pass of the loss and of judging: bounds the memory, changes no result (mixtures of experts:
    docs/training.md). Null: 8192, and 1024 for the loss on a CPU, where larger passes take as long and more memory."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints; a killed run resumes from the last one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older checkpoints are deleted."""
    eval_every: int = Field(20, ge=1)
    """Steps between measurements on the held-out prompts (`data.eval`), also before the first and after the last."""
    show_every: int = Field(10, ge=0)
    """Steps between printed examples; 0: none."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """What to do when the reward rises while gold or held-out evaluators fall."""
    seed: int = Field(0, ge=0)
    """Seeds data order, sampling, adapter weights and anchors."""

    @model_validator(mode="after")
    def _stops(self) -> Self:
        if "" in self.stop:
            raise ValueError("train.stop holds an empty text, after which every completion would end at once")
        return self


def named_questions(value: Any) -> Any:
    """`name: text` is short for `name: {ask: text}`."""
    if isinstance(value, dict):
        return {name: {"ask": q} if isinstance(q, str) else q for name, q in value.items()}
    return value


def evaluator_list(value: Any) -> Any:
    """`live`, `frozen` or a model's name is short for `{model: ...}`; a single one needs no list."""
    if isinstance(value, str | dict):
        value = [value]
    return [{"model": e} if isinstance(e, str) else e for e in value] if isinstance(value, list) else value


class Config(Section):
    """A run of `rlme train`."""

    model: Annotated[ModelConfig, short_for("path")]
    """The policy: a hub id, a folder, a .gguf file, `builtin:smollm2-135m`, or {path, dtype, revision, ...}."""
    data: Annotated[DataConfig, short_for("train")]
    """Prompts, and gold if there is any."""
    questions: Annotated[dict[str, QuestionConfig], BeforeValidator(named_questions)] = {}
    """name: question text, or name: {ask, weight, target, labels, template, readout}."""
    evaluators: Annotated[list[EvaluatorConfig], BeforeValidator(evaluator_list)] = [EvaluatorConfig(model="live")]
    """live | frozen | a model | {model, weight, name, dtype, ...} | {endpoint: {...}}."""
    judging: JudgingConfig = JudgingConfig()
    """Template and read-out of the questions."""
    reward: Annotated[RewardConfig, short_for("mode")] = RewardConfig()
    """Reward mode, anchors, and what happens when judgements fail."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    lora: LoraConfig | None = None
    """Train an adapter: `lora: {}` for the defaults. Without this key all weights are trained."""
    output: str = "runs/run"
    """The run's folder; nothing may be in it yet. Commands take `runs/` and the file's name where it is not given."""
    trl: dict[str, Any] = {}
    """Any other argument of TRL's GRPOConfig: use_vllm, report_to, push_to_hub, deepspeed, fsdp, ..."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pairwise = self.reward.mode == "pairwise"
        if pairwise and self.questions:
            raise ValueError("reward.mode pairwise compares completions and asks no questions: remove `questions`")
        if pairwise and self.reward.anchor > 0:
            raise ValueError("reward.anchor shows the answer beside a question, and reward.mode pairwise asks none")
        if self.reward.pairwise is not None and not pairwise:
            raise ValueError(f"reward.pairwise is given, but reward.mode is {self.reward.mode!r}: set it to pairwise")
        if pairwise and any(e.weight == 0 for e in self.evaluators):
            raise ValueError("an evaluator of weight 0 is only asked questions; reward.mode pairwise asks none")
        if pairwise and not self.evaluators:
            raise ValueError("`evaluators` is empty: give at least one, e.g. [live]")
        judged = self.reward.mode in ("rlme", "rlvr+rlme")
        if judged and not self.questions:
            raise ValueError("`questions` is empty: give at least one question, or set reward.mode to rlvr")
        if judged and not self.evaluators:
            raise ValueError("`evaluators` is empty: give at least one, e.g. [live]")
        if judged and all(q.weight == 0 for q in self.questions.values()):
            raise ValueError("all question weights are zero, so every reward would be 0: give one a non-zero `weight`")
        if judged and all(e.weight == 0 for e in self.evaluators):
            raise ValueError("all evaluator weights are zero, so every reward would be 0: give one a non-zero `weight`")
        for key, wants in (("mode", "rlvr" in self.reward.mode), ("anchor", self.reward.anchor > 0)):
            if wants and self.data.answer is None:
                value = getattr(self.reward, key)
                raise ValueError(
                    f"reward.{key} is {value!r}, which needs known answers: set data.answer to their column"
                )
        names = [e.label for e in self.evaluators]
        for kind, given in (("a question", self.questions), ("an evaluator", names)):
            if wrong := [name for name in given if not name.strip() or "/" in name or not name.isprintable()]:
                raise ValueError(f"the name of {kind} is {wrong[0]!r}, expected printable characters, and no slash")
        if duplicate := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"two evaluators are called {duplicate!r}: give one of them another `name`")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output)

    def evaluator_weights(self) -> list[float]:
        """v_j of equation 3, in the order of `evaluators`."""
        return evaluator_weights(self.evaluators)

"""Groups of completions to look at or choose from: read from a file, or sampled from the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlme.config import Config
from rlme.data import Prompt, Rows, build_prompts, gold_answer, load_rows
from rlme.errors import InputError
from rlme.evaluators.base import Evaluator
from rlme.judgement import Message
from rlme.judging import Sample
from rlme.templating import undeclared
from rlme.verify import extract_answer, same_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidate:
    """One completion: what an evaluator may see of it, and whether it is right (None: unknown)."""

    sample: Sample
    right: bool | None = None


Groups = list[list[Candidate]]
"""One list of completions per prompt."""


@dataclass
class Policy:
    """The policy's weights, loaded once: it may sample, and judge as `live` or `frozen`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, config: Config) -> Policy:
        """The configured model."""
        from rlme.models import load_model

        source = config.model
        loading: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
        return cls(load_model(source.path, dtype=source.dtype, **loading), policy_tokenizer(config))


def policy_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The configured model's tokenizer."""
    from rlme.models import load_tokenizer

    source = config.model
    return load_tokenizer(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)


def needs_policy(config: Config, *, sampling: bool) -> bool:
    """Whether the policy's weights have to be loaded: to sample, or because it judges itself."""
    return sampling or any(spec.model in ("live", "frozen") for spec in config.evaluators)


def load_evaluators(config: Config, policy: Policy | None) -> list[Evaluator]:
    """The configured evaluators. `live` and `frozen` are the same weights before training."""
    from rlme.evaluators.build import STYLES
    from rlme.evaluators.local import LocalEvaluator
    from rlme.training.build import judge_options, make_evaluator

    evaluators: list[Evaluator] = []
    for spec in config.evaluators:
        if spec.model in ("live", "frozen"):
            assert policy is not None
            evaluators.append(
                LocalEvaluator(
                    policy.model,
                    policy.tokenizer,
                    name=spec.label,
                    chat=STYLES[spec.style],
                    **judge_options(config),
                )
            )
        else:
            evaluators.append(make_evaluator(spec, config))
    return evaluators


def read_candidates(
    config: Config,
    source: str,
    *,
    completion: str,
    label: str | None = None,
    prompts: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Groups:
    """Completions from a file or data set with one row each; rows with the same prompt are a group.

    `completion` and `label` (true/false, 1/0, yes/no) are columns. Without a label, a completion is right when its
    answer equals the gold of `data.answer`, where the file has it. Neither is ever among a sample's columns.
    `prompts`: only the first so many groups.
    """
    data = config.data
    rows = load_rows(source, split=data.split, name=data.name)
    for column in (completion, label):
        if column is not None and column not in rows.columns:
            raise InputError(f"{source} has no column {column!r}; its columns: {', '.join(rows.columns)}")
    groups: dict[str, list[Candidate]] = {}
    for number, record in zip(rows.numbers, rows.records, strict=True):
        text = record[completion]
        if not isinstance(text, str):
            raise InputError(f"{source}, row {number}: column {completion!r} is {text!r}, expected a text")
        hidden = {completion, label, *_gold_columns(data.answer, rows.columns)}
        if tokenizer is None and (data.chat or isinstance(record.get(data.prompt), list)):
            # No judge is the policy, but chat prompts are rendered as it reads them.
            tokenizer = policy_tokenizer(config)
        gold = data.answer if label is None else None
        if gold is not None and "{{" not in gold and record.get(gold) in (None, ""):
            gold = None  # whether this completion is right is not known
        if gold is not None and gold_answer(record, gold, data.answer_format, f"{source}, row {number}") is None:
            gold = None
        built = build_prompts(
            Rows(rows.source, rows.columns, [record], [number]),
            prompt=data.prompt,
            system=data.system,
            answer=gold,
            answer_from=data.answer_format,
            tokenizer=tokenizer,
            chat=data.chat if tokenizer is not None else False,
        ).prompts[0]
        key = str(built.prompt)
        if key not in groups and prompts is not None and len(groups) >= prompts:
            continue
        right = _label(record[label], source, number, label) if label is not None else None
        columns = {k: v for k, v in built.columns.items() if k not in hidden}
        groups.setdefault(key, []).append(_candidate(config, built, text, columns, right, tokenizer))
    return list(groups.values())


def _gold_columns(answer: str | None, columns: Sequence[str]) -> set[str]:
    """What gold is made of: a column, or those that a template shows."""
    if answer is None or answer in columns:
        return {answer} if answer else set()
    return undeclared(answer)


def _label(value: Any, source: str, number: int, column: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "1.0": True, "0.0": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise InputError(f"{source}, row {number}: column {column!r} is {value!r}, expected true/false, 1/0 or yes/no")
    return found


def _candidate(
    config: Config,
    prompt: Prompt,
    text: str,
    columns: Mapping[str, Any],
    right: bool | None,
    tokenizer: PreTrainedTokenizerBase | None,
    n_tokens: int | None = None,
) -> Candidate:
    form = config.data.completion_format or ("auto" if config.data.answer else None)
    answer = None if form is None else (extract_answer(text, form) or "")
    if right is None and prompt.gold is not None:
        right = same_answer(answer or None, prompt.gold, config.data.compare)
    if n_tokens is None:
        n_tokens = 0 if tokenizer is None else len(tokenizer(text, add_special_tokens=False)["input_ids"])
    messages: str | tuple[Message, ...]
    messages = (
        prompt.prompt
        if isinstance(prompt.prompt, str)
        else tuple({"role": m["role"], "content": m["content"]} for m in prompt.prompt)
    )
    context = _context(prompt, tokenizer)
    return Candidate(Sample(messages, text, context, answer, n_tokens, columns=columns), right)


def _context(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    assert tokenizer is not None  # build_prompts makes chat prompts only with a tokenizer
    return str(tokenizer.apply_chat_template(prompt.prompt, tokenize=False, add_generation_prompt=True))


def sample_candidates(config: Config, policy: Policy, *, prompts: int, samples: int, seed: int = 0) -> Groups:
    """`samples` completions of each of the first `prompts` training prompts, drawn as training would draw them."""
    from rlme.models import end_tokens
    from rlme.sampling import sample
    from rlme.training.build import load_prompts

    chosen = load_prompts(config, policy.tokenizer)[0].prompts[:prompts]
    tokenizer, train = policy.tokenizer, config.train
    ids = [
        list(tokenizer(_context(p, tokenizer), add_special_tokens=isinstance(p.prompt, str))["input_ids"])
        for p in chosen
    ]
    ends = {*end_tokens(policy.model), tokenizer.eos_token_id} - {None}
    drawn = sample(
        policy.model,
        ids,
        samples,
        max_new_tokens=train.max_completion_tokens,
        temperature=train.temperature,
        top_p=train.top_p,
        top_k=train.top_k,
        min_p=train.min_p,
        repetition_penalty=train.repetition_penalty,
        eos_token_ids=sorted(ends),
        stop_strings=train.stop,
        tokenizer=tokenizer,
        seed=seed,
    )
    return [
        [
            _candidate(
                config,
                prompt,
                str(tokenizer.decode(one.ids, skip_special_tokens=True)),
                prompt.columns,
                None,
                tokenizer,
                len(one.ids),
            )
            for one in group
        ]
        for prompt, group in zip(chosen, drawn, strict=True)
    ]


def labelled(groups: Sequence[Sequence[Candidate]]) -> bool:
    """Whether every completion is known to be right or wrong, and both occur."""
    labels = [candidate.right for group in groups for candidate in group]
    return None not in labels and len(set(labels)) == 2


def group_stds(values: Sequence[Sequence[float | None]]) -> list[float]:
    """The (population) standard deviation within each group that has two values."""
    stds = []
    for group in values:
        known = [v for v in group if v is not None]
        if len(known) > 1:
            mean = math.fsum(known) / len(known)
            stds.append(math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known)))
    return stds

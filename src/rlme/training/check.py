"""What a run refuses before a model is loaded; `rlme check` asks for it alone."""

from __future__ import annotations

from pathlib import Path

from rlme.config import Config
from rlme.data import PromptSet
from rlme.errors import InputError
from rlme.evaluators.build import make_judging, make_questions
from rlme.judging import check_templates
from rlme.models import check_model, load_tokenizer
from rlme.questions import Question
from rlme.training.build import check_pairwise, load_prompts
from rlme.training.run_folder import RunFolder
from rlme.training.settings import trl_arguments
from rlme.verify import check_method


def check_start(config: Config, prompts: PromptSet, held_out: PromptSet | None = None) -> list[Question]:
    """Refuse what does not go with these prompts, held-out ones included; returns the questions.

    Raises:
        InputError: gold that is needed and missing, references likewise, a template that uses what is not there.
    """
    if config.data.completion_format is not None:
        check_method(config.data.completion_format)
    if "rlvr" in config.reward.mode or config.reward.anchor > 0:
        prompts.require_gold()
    if config.reward.mode == "pairwise":
        check_pairwise(config, prompts)
    questions, judging = make_questions(config.questions), make_judging(config.judging)
    check_templates(questions, judging, list(prompts.prompts[0].columns))
    if held_out is not None:
        try:
            check_templates(questions, judging, list(held_out.prompts[0].columns))
        except InputError as error:
            raise InputError(f"data.eval: {error}") from None
    return questions


def check_file(config: Config) -> list[str]:
    """Refuse what can be refused without a model. Returns sentences: about the data, and of what was not looked at."""
    folder = RunFolder(config.folder)
    trl_arguments(config, folder)
    source = config.model
    try:
        tokenizer = load_tokenizer(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except InputError as error:
        if _is_here(source.path):
            raise
        return [f"not looked at: the data, as the model's tokenizer is not here: {error}"]
    sentences = []
    prompts, held_out = load_prompts(config, tokenizer)
    for name, part in (("train", prompts), ("eval", held_out)):
        sentences += [f"{name}: {line}" for line in part.report.sentences()] if part is not None else []
    check_start(config, prompts, held_out)
    for spec in config.evaluators:
        if spec.model in (None, "live", "frozen"):
            continue
        if _is_here(str(spec.model)):
            check_model(str(spec.model), spec.revision, spec.trust_remote_code, load_in_4bit=spec.load_in_4bit)
        else:
            sentences.append(f"not looked at: evaluator {spec.label}, which is a hub model")
    try:
        folder.check_new()
    except InputError as error:  # not the file's fault: --output may name another one
        sentences.append(f"output: {error}")
    return sentences


def _is_here(source: str) -> bool:
    """Whether a model is, or should be, on this machine: no hub id."""
    return Path(source).exists() or ":" in source or source.startswith((".", "/"))

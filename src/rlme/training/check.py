"""What a run refuses before a model is loaded; `rlme check` asks for it alone."""

from __future__ import annotations

from pathlib import Path

from rlme.config import Config
from rlme.data import PromptSet
from rlme.errors import InputError
from rlme.evaluators.build import make_judging, make_questions
from rlme.judging import check_templates
from rlme.models import load_tokenizer
from rlme.questions import Question
from rlme.training.build import check_pairwise, load_prompts
from rlme.training.run_folder import RunFolder
from rlme.training.settings import trl_arguments
from rlme.verify import check_method


def check_start(config: Config, prompts: PromptSet) -> list[Question]:
    """Refuse what does not go with these prompts; returns the questions.

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
    return questions


def check_file(config: Config) -> list[str]:
    """Refuse what can be refused without a model. Returns sentences: about the data, and of what was not looked at."""
    folder = RunFolder(config.folder)
    trl_arguments(config, folder)
    source = config.model
    try:
        tokenizer = load_tokenizer(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    except InputError as error:
        if Path(source.path).exists() or ":" in source.path or source.path.startswith((".", "/")):
            raise
        return [f"not looked at: the data, as the model's tokenizer is not here: {error}"]
    sentences = []
    prompts, held_out = load_prompts(config, tokenizer)
    for name, part in (("train", prompts), ("eval", held_out)):
        sentences += [f"{name}: {line}" for line in part.report.sentences()] if part is not None else []
    check_start(config, prompts)
    try:
        folder.check_new()
    except InputError as error:  # not the file's fault: --output may name another one
        sentences.append(f"output: {error}")
    return sentences

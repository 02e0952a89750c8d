"""What can be known to fail before the first stage, and is said there: the stages take hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlme.align.config import AlignConfig
from rlme.align.judge import PairwiseJudge
from rlme.align.judging import compare_protocol
from rlme.align.prompts import AlignPrompt, AlignPrompts
from rlme.align.protocols import load_protocol
from rlme.align.run_models import RunModels
from rlme.align.train import dpo_arguments, sft_arguments
from rlme.config_file import read_yaml
from rlme.errors import InputError
from rlme.evaluators.build import check_evaluator, make_judging, make_questions
from rlme.judging import UNRECORDED, check_templates
from rlme.models import check_model, load_tokenizer


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier run of `rlme align`: its files would be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.yaml"
    # Stages copied here from another run, to be skipped, come without a configuration.
    own = "judge" in read_yaml(config) if config.is_file() else any(folder.glob("*/stage.json"))
    if not own:
        raise InputError(f"{folder} exists already, and is no run of rlme align: choose another `output` (or --output)")


def check_ahead(config: AlignConfig, models: RunModels, prompts: AlignPrompts) -> None:
    """Raise `InputError` for settings of later stages that cannot work. Judges behind endpoints are tried where their
    calls are estimated."""
    if config.sft is not None:
        sft_arguments(config, config.folder / "sft", len(prompts.train))
    dpo_arguments(config, config.folder / "dpo", len(prompts.train))
    _check_judges(config, models, prompts.train)
    if config.compare is not None and prompts.held_out:
        _check_comparison(config, models, prompts.held_out)


def _check_judges(config: AlignConfig, models: RunModels, train: Sequence[AlignPrompt]) -> None:
    stage = config.judge
    questions, judging = make_questions(stage.questions), make_judging(stage.judging)
    check_templates(questions, judging, list(train[0].columns), absent=UNRECORDED)
    with _under("judge.evaluators"):
        for evaluator in models.without_weights(stage.evaluators):
            if questions:
                check_evaluator(evaluator, questions, judging)
            else:
                PairwiseJudge([evaluator], load_protocol(stage.protocol))


def _check_comparison(config: AlignConfig, models: RunModels, held_out: Sequence[AlignPrompt]) -> None:
    compare = config.compare
    assert compare is not None
    protocol = compare_protocol(config, held_out)
    if protocol.needs_reference and (bare := next((p for p in held_out if not p.references), None)):
        raise InputError(
            f"compare.protocol is {protocol.name!r}, which shows the judge a reference, but row {bare.row} of "
            f"{config.data.eval} has none (column {config.data.reference!r})"
        )
    with _under("compare.evaluators"):
        for evaluator in models.without_weights(compare.evaluators or config.judge.evaluators):
            PairwiseJudge([evaluator], protocol)
    text = "\n".join(str(p.prompt) for p in held_out)
    trust = config.model.trust_remote_code
    for name, source in compare.also.items():
        with _under(f"compare.also.{name}"):
            check_model(source, None, trust)
            tokenizer = load_tokenizer(source, trust_remote_code=trust)
            if tokenizer(text)["input_ids"] != models.tokenizer(text)["input_ids"]:
                raise InputError(f"{source} has another tokenizer than {config.model.path}, which writes all prompts")


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Name the key in what is said about its value."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None

"""What the judging stages depend on beside the stage before them: with other inputs they are done anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlme.align.config import AlignConfig, JudgeStage
from rlme.align.prompts import AlignPrompt
from rlme.align.protocols import load_protocol
from rlme.align.stage import source_fingerprint
from rlme.evaluators.build import make_judging, make_questions
from rlme.evaluators.endpoint_config import SAME_VERDICTS
from rlme.questions import find_template
from rlme.templating import undeclared

CHANGES_NO_VERDICT: Any = {
    "max_failure_rate": True,
    "resamples": True,
    "judging": {"cache", "cache_mb", "mass_warning"},
    "evaluators": {"__all__": {"name": True, "trust_remote_code": True, "endpoint": SAME_VERDICTS}},
}
"""Keys of `judge` and `compare` that may change while the verdicts that were paid for stay."""


def judge_inputs(config: AlignConfig, prompts: Sequence[AlignPrompt]) -> list[Any]:
    """Of the scores of candidates: settings, the protocol's wording, the judges' weights, what questions show."""
    return [*_judged_with(config, config.judge.evaluators, config.judge.protocol), _shown(config.judge, prompts)]


def compare_inputs(config: AlignConfig) -> list[Any]:
    """Of the verdicts of the final comparison."""
    compare = config.compare
    assert compare is not None
    evaluators, protocol = compare.evaluators or config.judge.evaluators, compare.protocol or config.judge.protocol
    return [
        compare.model_dump(mode="json", exclude=CHANGES_NO_VERDICT),
        _judged_with(config, evaluators, protocol),
    ]


def _judged_with(config: AlignConfig, evaluators: Sequence[Any], protocol: str) -> list[Any]:
    weights = [source_fingerprint(e.model, e.revision) for e in evaluators if e.model is not None]
    settings = config.judge.model_dump(mode="json", exclude=CHANGES_NO_VERDICT)
    return [settings, asdict(load_protocol(protocol)), weights]


def _shown(stage: JudgeStage, prompts: Sequence[AlignPrompt]) -> list[dict[str, Any]]:
    """The data columns in the questions and their templates; pairwise protocols show none."""
    questions, judging = make_questions(stage.questions), make_judging(stage.judging)
    texts = {q.ask for q in questions}
    texts |= {find_template(q.template or judging.template, chat=c).text for q in questions for c in (False, True)}
    names = {name for text in texts for name in undeclared(text)}
    return [{name: value for name, value in p.columns.items() if name in names} for p in prompts]

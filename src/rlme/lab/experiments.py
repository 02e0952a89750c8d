"""The paper's experiments as lists of ordinary configurations; `rlme lab NAME` runs them through `rlme.training`.

An experiment is a name and its arms; an arm is a label and what it changes in the base configuration. Nothing here
trains, judges or measures by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlme.lab import corpus

Changes = Mapping[str, Any]

BASE: dict[str, Any] = {
    "model": "builtin:lab",
    "data": {
        "train": "plain-train.jsonl",
        "eval": "plain-eval.jsonl",
        "prompt": "---------Problem---------\n{{ problem }}\n---------Solution---------\n",
        "answer": "answer",
        "answer_format": "text",
        "completion_format": "boxed",
        "compare": "exact",
        "eval_limit": None,
    },
    "questions": {"correct": corpus.CORRECT},
    "evaluators": [{"model": "live"}],
    "judging": {"template": {"kind": "text", "text": corpus.TEMPLATE}, "readout": "marker"},
    "reward": {"mode": "rlme"},
    "train": {
        "steps": 120,
        "prompts_per_step": 16,
        "group_size": 6,
        "learning_rate": 3e-4,
        "max_completion_tokens": 52,
        "precision": "float32",
        "eval_every": 20,
        "show_every": 0,
        "checkpoint_every": 1000,
        "keep_checkpoints": 1,
    },
}

RLVR: Changes = {"reward": {"mode": "rlvr"}, "questions": {}}
"""Accuracy only; asks nothing."""

FROZEN: Changes = {"evaluators": [{"model": "builtin:lab", "name": "frozen"}]}


def evaluated_by(model: str) -> Changes:
    """The reward from another, frozen model."""
    return {"evaluators": [{"model": f"builtin:{model}"}]}


def brevity(weight: float) -> Changes:
    """The question about the length after the one about the answer, in one block."""
    length = {"ask": corpus.LENGTH.format(low=20, high=60), "weight": weight}
    return {"questions": {"correct": corpus.CORRECT, "brief": length}, "judging": {"joint": True}}


@dataclass(frozen=True)
class Arm:
    """One configuration of an experiment."""

    label: str
    changes: tuple[Changes, ...] = ()
    paper: str | None = None
    """Its curve in the paper's figure."""
    weight: float | None = None
    """Its place in a sweep of weights."""


@dataclass(frozen=True)
class Experiment:
    """A figure or table of the paper."""

    name: str
    title: str
    shows: str
    arms: tuple[Arm, ...]
    common: Changes = field(default_factory=dict)
    paper: str | None = None
    """The figure in the file of the paper's curves."""

    def arm(self, label: str) -> Arm:
        """The arm of that label."""
        return next(a for a in self.arms if a.label == label)


LONG: Changes = {"train": {"steps": 467}}
HINTED: Changes = {
    "model": "builtin:lab-reader",  # the base model does not copy a claim, nor read against what it was taught
    "data": {"train": "hinted-train.jsonl", "eval": "hinted-eval.jsonl"},
    "train": {"steps": 160},
}
READING: Changes = {
    "model": "builtin:lab-reader",
    "data": {"train": "reading-train.jsonl", "eval": "reading-eval.jsonl"},
    "questions": {"supported": corpus.SUPPORTED, "only_text": corpus.ONLY_TEXT},
    "train": {"steps": 100, "eval_every": 50},
}
CROWD: Changes = {
    "evaluators": [
        {"model": "live"},
        *({"model": f"builtin:{name}"} for name in ("lab", "lab-judge", "lab-weak")),
    ]
}

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "fig2",
            "Figure 2: without labels as with them",
            "RLME (live self, one question) against RLVR",
            (Arm("RLVR", (RLVR,), "RLVR"), Arm("RLME", (), "RLME")),
            paper="fig2",
        ),
        Experiment(
            "fig3",
            "Figure 3: the choice of generator",
            "generators of different quality and size under one frozen evaluator",
            (
                Arm("lab", (), "Qwen3-4B-Base"),
                Arm("lab-large", ({"model": "builtin:lab-large"},), "SmolLM3-3B"),
                Arm("lab-small", ({"model": "builtin:lab-small"},), "Qwen2.5-1.5B"),
                Arm("lab-small-RLVR", ({"model": "builtin:lab-small"}, RLVR)),
                Arm("lab-weak", ({"model": "builtin:lab-weak"},), "Llama-3.2-3B"),
            ),
            common=FROZEN,
            paper="fig3",
        ),
        Experiment(
            "fig4",
            "Figure 4: the choice of evaluator",
            "one generator under evaluators of different quality",
            (
                Arm("live", (), "Live Qwen3"),
                Arm("frozen", (FROZEN,), "Frozen Qwen3"),
                Arm("lab-judge", (evaluated_by("lab-judge"),), "Frozen Qwen2.5"),
                Arm("lab-weak", (evaluated_by("lab-weak"), {"train": {"eval_every": 10}}), "Frozen SmolLM3"),
            ),
            paper="fig4",
        ),
        Experiment(
            "fig5",
            "Figure 5: long training",
            "whether reward and accuracy part, and what a few known answers change",
            (
                Arm("RLVR", (RLVR,), "RLVR"),
                Arm("RLME", (), "RLME"),
                Arm("RLME-Crowd", (CROWD,), "RLME-Crowd"),
                Arm("RLME-10GT", ({"reward": {"anchor": 0.1}},), "RLME-10GT"),
                Arm("RLME-1GT", ({"reward": {"anchor": 0.01}},), "RLME-1GT"),
                Arm("RLME-weak", (evaluated_by("lab-weak"),)),
                Arm("RLME-weak-10GT", (evaluated_by("lab-weak"), {"reward": {"anchor": 0.1}})),
            ),
            common=LONG,
            paper="fig5",
        ),
        Experiment(
            "fig6",
            "Figure 6: accuracy and brevity",
            "a second question about length; a sweep of its weight",
            (
                Arm("RLVR", (RLVR,), "RLVR"),
                Arm("RLME", (), "RLME", weight=0.0),
                Arm("RLME-Concise", (brevity(1.0),), "RLME-Concise", weight=1.0),
                *(Arm(f"w={w:g}", (brevity(w),), weight=w) for w in (0.1, 0.3, 3.0)),
            ),
            paper="fig6",
        ),
        Experiment(
            "fig7",
            "Figure 7: planted answers",
            "true answers planted in training prompts, random ones at test: who copies",
            (
                Arm("RLVR", (RLVR,), "RLVR"),
                Arm("RLME", (), "RLME"),
                Arm("RLME-NoCheat", ({"questions": {"logical": corpus.LOGICAL}},), "RLME-NoCheat"),
            ),
            common=HINTED,
            paper="fig7",
        ),
        Experiment(
            "table1",
            "Tables 1 and 2: reading",
            "four families of moves defined in the text; definitions against what the corpus taught only at test",
            (
                Arm("RLVR", (RLVR,)),
                Arm("RLVR+RLME", ({"reward": {"mode": "rlvr+rlme"}},)),
                Arm("RLME", ()),
            ),
            common=READING,
        ),
    )
}
ALIASES = {"table2": "table1"}
"""The paper's second table is the counterfactual column of the same runs."""


def configuration(experiment: Experiment, arm: Arm, seed: int, data: Path, output: Path) -> dict[str, Any]:
    """The configuration of one run, as a YAML file would hold it."""
    content = copy.deepcopy(BASE)
    for changes in (experiment.common, *arm.changes, {"train": {"seed": seed}, "output": str(output)}):
        for key, value in changes.items():
            if isinstance(value, Mapping) and isinstance(content.get(key), dict) and key != "questions":
                content[key] |= copy.deepcopy(dict(value))
            else:
                content[key] = copy.deepcopy(value)
    for key in ("train", "eval"):
        content["data"][key] = str(data / content["data"][key])
    return content

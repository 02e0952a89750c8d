"""Runs on a GPU that is pretended (`pretend_gpu.py`): the CPU's numbers, nothing on the wrong device, and one wait for
each token of a batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_gpu import build
from tests.tiny_runs import is_timing, read_metrics, read_rollouts, write_config

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None or torch.version.cuda is not None,
    reason="needs a C++ compiler, and a PyTorch without CUDA",
)
ROOT = Path(__file__).parent.parent
# Small steps: what rounding differs in is not to become another sign in Adam's first ones.
TRAIN = {"learning_rate": 1e-5, "steps": 2, "checkpoint_every": 1, "eval_every": 1, "kl": 0.1}
SELVES = ["live", {"model": "frozen", "dtype": "float32"}]
RUNS: dict[str, dict[str, Any]] = {
    "full": {"evaluators": SELVES},
    "what sampling read is not read again": {"judging": {"template": "paper", "readout": "marker"}},
    "prompts are held from pass to pass": {
        "data": {"prompt": "Add the numbers, say which of them is the larger one, and why that is so. {{ question }}"},
        "evaluators": SELVES,
        "train": {**TRAIN, "token_budget": 64},
    },
    "lora": {"evaluators": ["live", "frozen"], "lora": {"r": 2}},
    "by default": {"evaluators": ["live", "frozen"], "train": {"precision": "auto", "top_p": 0.9, "steps": 1}},
}
BY_DEFAULT = "by default"


# Trains by every configuration but the first argument's, which is a model, and says how often sampling from it waits.
PROGRAM = """
import json, sys
from tests.pretend_gpu import pretend
kind, library, policy, *configs = sys.argv[1:]
waits = pretend(kind, library)
import torch
from transformers import AutoModelForCausalLM
from rlme.cli import app
from rlme.models import default_device
from rlme.sampling import sample
torch.set_num_threads(1)
assert default_device().type == kind
for config in configs:
    app(["train", config], standalone_mode=False)
model = AutoModelForCausalLM.from_pretrained(policy).to(kind)
told = []
for tokens in (2, 10, 30):  # the first time, ways of sampling are compared
    before = waits()
    drawn = sample(model, [[5, 6, 7], [8, 9]], 4, max_new_tokens=tokens, temperature=1.0, eos_token_ids=[])
    assert all(len(s.ids) == tokens for group in drawn for s in group)
    told.append(waits() - before)
prompts, options = [[5, 6, 7], [8, 9]], {"max_new_tokens": 8, "top_p": 0.9, "eos_token_ids": []}
drawn = sample(model, prompts, 4, **options)
torch.use_deterministic_algorithms(True)
again = sample(model, prompts, 4, **options)
assert [[s.ids for s in group] for group in again] == [[s.ids for s in group] for group in drawn]
print(json.dumps(told))
"""


@dataclass
class Ran:
    """What a process did for which there is a GPU of a `kind`: runs in `folder`/NAME, and waits while sampling."""

    kind: str
    folder: Path
    waits: list[int]


def configure(folder: Path, policy: Path, name: str) -> str:
    changes = RUNS[name]
    train = changes.get("train") or ({**TRAIN, "kl": 0.0} if "lora" in changes else TRAIN)
    (folder / name).mkdir(parents=True)
    return str(write_config(folder / name, policy, **{**changes, "train": train}))


@pytest.fixture(scope="module", params=["cuda", "mps"])
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path) -> Ran:
    """All in one process: importing takes longer than the rest."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    library = build(kind, folder)
    configs = [configure(folder, tiny_policy_dir, name) for name in RUNS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, str(library), str(tiny_policy_dir), *configs],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return Ran(kind, folder, json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", [name for name in RUNS if name != BY_DEFAULT])
def test_runs_equal_the_cpus(gpu: Ran, name: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    from rlme.cli import app

    app(["train", configure(tmp_path, tiny_policy_dir, name)], standalone_mode=False)
    (there, texts), (here, expected) = (
        (read_metrics(run), [row["completion"] for row in read_rollouts(run)])
        for run in (folder / name / "run" for folder in (gpu.folder, tmp_path))
    )
    assert texts == expected
    for found, wanted in zip(there, here, strict=True):
        for key, value in wanted.items():
            if not is_timing(key):
                assert found[key] == pytest.approx(value, abs=2e-4), key


def test_a_run_as_a_gpu_has_it_by_default(gpu: Ran) -> None:
    """In bfloat16 where the GPU has it."""
    (metrics,) = read_metrics(gpu.folder / BY_DEFAULT / "run")
    assert metrics["judge/live/correct/score"] == pytest.approx(metrics["judge/frozen/correct/score"], abs=0.05)
    assert metrics["grad_norm"] > 0


def test_sampling_waits_once_for_each_token(gpu: Ran) -> None:
    _, few, many = gpu.waits
    # Apple's draws on the CPU: it waits for the sums of the blocks, and for the block, too.
    assert many - few == 20 * (1 if gpu.kind == "cuda" else 3)

"""Runs on a GPU that is pretended (`pretend_gpu.py`): the CPU's numbers, nothing on the wrong device, and one wait for
each token of a batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
    "lora": {"evaluators": ["live", "frozen"], "lora": {"r": 2}},
}


@pytest.fixture(scope="module", params=["cuda", "mps"])
def gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Kind and library."""
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param))


def on_gpu(gpu: tuple[str, Path], code: str, *arguments: str) -> str:
    """The output of a program for which there is a GPU. It has `kind`, `waits` and `arguments`."""
    kind, library = gpu
    begin = "import sys; from tests.pretend_gpu import pretend; kind, library, *arguments = sys.argv[1:]\n"
    program = begin + "waits = pretend(kind, library)\n" + code
    done = subprocess.run(
        [sys.executable, "-c", program, kind, str(library), *arguments],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


TRAINING = """
import torch
from rlme.cli import app
from rlme.models import default_device
torch.set_num_threads(1)
assert default_device().type == kind
for config in arguments:
    app(["train", config], standalone_mode=False)
"""


def test_runs_equal_the_cpus(gpu: tuple[str, Path], tiny_policy_dir: Path, tmp_path: Path) -> None:
    from rlme.cli import app

    configs = {}
    for name, changes in RUNS.items():
        for place in ("gpu", "cpu"):
            folder = tmp_path / name / place
            folder.mkdir(parents=True)
            train = {**TRAIN, "kl": 0.0} if "lora" in changes else TRAIN
            configs[name, place] = write_config(folder, tiny_policy_dir, train=train, **changes)
    on_gpu(gpu, TRAINING, *(str(configs[name, "gpu"]) for name in RUNS))
    for name in RUNS:
        app(["train", str(configs[name, "cpu"])], standalone_mode=False)
        (there, texts), (here, expected) = (
            (read_metrics(run), [row["completion"] for row in read_rollouts(run)])
            for run in (configs[name, place].parent / "run" for place in ("gpu", "cpu"))
        )
        assert texts == expected, name
        for found, wanted in zip(there, here, strict=True):
            for key, value in wanted.items():
                if not is_timing(key):
                    assert found[key] == pytest.approx(value, abs=2e-4), (name, key)


def test_a_run_as_a_gpu_has_it_by_default(gpu: tuple[str, Path], tiny_policy_dir: Path, tmp_path: Path) -> None:
    """In bfloat16 where the GPU has it."""
    config = write_config(
        tmp_path, tiny_policy_dir, evaluators=["live", "frozen"], train={"precision": "auto", "top_p": 0.9, "steps": 1}
    )
    on_gpu(gpu, TRAINING, str(config))
    (metrics,) = read_metrics(tmp_path / "run")
    assert metrics["judge/live/correct/score"] == pytest.approx(metrics["judge/frozen/correct/score"], abs=0.05)
    assert metrics["grad_norm"] > 0


WAITING = """
import json, torch
from transformers import AutoModelForCausalLM
from rlme.sampling import sample
model = AutoModelForCausalLM.from_pretrained(arguments[0]).to(kind)
told = []
for tokens in (2, 10, 30):  # the first time, ways of sampling are compared
    before = waits()
    drawn = sample(model, [[5, 6, 7], [8, 9]], 4, max_new_tokens=tokens, temperature=1.0, eos_token_ids=[])
    assert all(len(s.ids) == tokens for group in drawn for s in group)
    told.append(waits() - before)
print(json.dumps(told))
"""


def test_sampling_waits_once_for_each_token(gpu: tuple[str, Path], tiny_policy_dir: Path) -> None:
    _, few, many = json.loads(on_gpu(gpu, WAITING, str(tiny_policy_dir)).splitlines()[-1])
    # Apple's draws on the CPU: it waits for the sums of the blocks, and for the block, too.
    assert many - few == 20 * (1 if gpu[0] == "cuda" else 3)

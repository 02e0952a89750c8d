"""`rlme` in processes of their own, born of one that has imported what they all need, which takes longer than a run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

BORN = multiprocessing.get_context("forkserver")
BORN.set_forkserver_preload(["rlme.training.run", "rlme.training.trainer", "tests.born"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_rlme(arguments: tuple[str, ...], errors: str, environment: Mapping[str, str]) -> None:
    from rlme.cli import main

    os.environ.update({**ENVIRONMENT, **environment})
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    main(list(arguments))


class Rlme:
    """`rlme ARGUMENTS` at work."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115  # gone with this object
        self.errors = Path(self._stderr.name)
        given = (arguments, str(self.errors), dict(environment or {}))
        self.process = BORN.Process(target=run_rlme, args=given, daemon=True)
        self.process.start()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = 300) -> int:
        self.process.join(timeout=seconds)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    def finish(self) -> None:
        assert self.wait() == 0, self.errors.read_text()[-3000:]

"""Ending a run cleanly, and warning about labels that hold little probability."""

from __future__ import annotations

import signal
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from rlme.label_mass import low_mass
from rlme.processes import everywhere


class Interrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the current step with everything saved; a second one ends it at once.

    Of several processes, all end after the step in which the first of them was told to."""

    def __init__(self, console: Console, accelerator: Any) -> None:
        self.console, self.accelerator = console, accelerator
        self.requested = False
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("stopping after this step; press Ctrl-C again to stop at once (the last checkpoint stays)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop."""
        if any(everywhere([self.requested], self.accelerator)):
            self.stopped = True
            control.should_save = control.should_training_stop = True


class MassWarning:
    """Warn once per question when its labels hold little of the evaluator's probability."""

    def __init__(self, console: Console, threshold: float) -> None:
        self.console, self.threshold = console, threshold
        self.warned: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key.startswith("judge/") and key.endswith("/mass") and value < self.threshold and key not in self.warned:
                self.warned.add(key)
                _, evaluator, question, _ = key.split("/", 3) if key.count("/") == 3 else ("", key, "", "")
                text = low_mass(evaluator, "question", question, value)
                self.console.print(text, style="yellow", markup=False)

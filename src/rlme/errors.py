"""The two errors a user can meet on purpose. Everything else is a bug and shows its traceback."""

from collections.abc import Mapping
from typing import Any


class InputError(ValueError):
    """Bad input: one clear sentence naming file, key or row, the value, and what is expected.

    The command line prints the sentence and ends with exit code 2, without a traceback.
    """


class RunStopped(RuntimeError):
    """A run ended before its last step, with its state saved (too many failed judgements, an alarm, a cap).

    The command line prints the sentence and how to go on, and ends with exit code 3. `answered`: of what was being
    asked, by its number, what has been answered: it is paid for, so a cache keeps it.
    """

    def __init__(self, sentence: str, *, answered: Mapping[int, Any] | None = None) -> None:
        super().__init__(sentence)
        self.answered = answered or {}

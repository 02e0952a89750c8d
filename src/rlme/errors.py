"""The two errors a user can meet on purpose. Everything else is a bug and shows its traceback."""


class InputError(ValueError):
    """Bad input: one clear sentence naming file, key or row, the value, and what is expected.

    The command line prints the sentence and ends with exit code 2, without a traceback.
    """


class RunStopped(RuntimeError):
    """A run ended before its last step, with its state saved (too many failed judgements, an alarm, a cap).

    The command line prints the sentence and how to go on, and ends with exit code 3.
    """

"""Equality of mathematical expressions in a process of its own, because what it parses is untrusted.

A completion may hold `9^{9^{9}}`, on which exact arithmetic never ends. Timeouts by signals work in the
main thread only, and not inside one long multiplication; so math-verify runs in a child process that ends
itself when time or memory run out, and the next question starts a new one. The child runs this file alone.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

TIMEOUT_S = 3
_MEMORY_BYTES = 4 << 30


class MathWorker:
    """Starts on the first question (about a second), answers one at a time (some ms), from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def equal(self, gold: str, predicted: str) -> bool:
        """Whether two expressions (LaTeX or plain) are equal; False if unreadable or out of time."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([gold, predicted]) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # interrupted: the answer to this would be read as the next one's
                self.close()
                raise
            if not answer:  # it ended itself
                self.close()
            return answer == "1\n"

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork must not share its parent's pipe
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run, which then saves
            )
            atexit.register(self.close)
        return self._process


def _serve() -> None:
    """Answer every line [gold, predicted] on stdin with 1 or 0, until stdin closes."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system can limit memory
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    from math_verify import parse, verify

    for line in sys.stdin:
        # This watchdog needs no interpreter: it ends the process even in the middle of one multiplication.
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
        try:
            gold, predicted = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            equal = bool(gold and predicted and verify(gold, predicted, timeout_seconds=None))
        except (Exception, RecursionError):
            equal = False
        faulthandler.cancel_dump_traceback_later()
        print(int(equal), flush=True)


if __name__ == "__main__":
    _serve()

"""A command's output folder: made, and one process's alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rlme.errors import InputError


def make_folder(path: Path, *parts: Path) -> None:
    """Make the folder, and `parts` of it; `InputError` where that cannot be."""
    try:
        for folder in (path, *parts):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output is {str(path)!r}, which cannot be made: {error.strerror}") from None


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Keep other processes out, which would write the same files; `InputError` if one is in it, saying it is `busy`."""
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: {busy}") from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()

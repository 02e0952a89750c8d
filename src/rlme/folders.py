"""A command's output folder: made, one process's alone, its files whole at every moment."""

from __future__ import annotations

import os
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


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file by one rename: at every moment the old one or the new one is there, whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Have the system write a file or folder to disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and writes back only what is open for writing
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

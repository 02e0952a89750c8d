"""Files that a command writes at its end."""

from __future__ import annotations

from pathlib import Path

from rlme.errors import InputError


def check_writable(*paths: Path | None) -> None:
    """Raise `InputError` for a file that cannot be written, before the work whose result would be lost.

    Makes the folders it is to be in. None stands for a file that was not asked for.
    """
    for path in paths:
        try:
            if path is None or path.is_fifo():  # opening a pipe twice would tell its reader that all has come
                continue
            new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if new:
                path.resolve().unlink()  # the file itself, where `path` is a link to it
        except OSError as error:
            raise InputError(
                f"{str(path)!r} cannot be written ({error.strerror}): expected a file in a folder that can"
            ) from None

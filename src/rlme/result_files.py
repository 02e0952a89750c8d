"""Files that a command writes at its end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rlme.errors import InputError


def check_writable(*paths: Path | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise `InputError` for a file that cannot be written, before the work whose result would be lost.

    The same for one that another of `paths` would overwrite, and for one of `inputs`, which are only read. Makes the
    folders the files are to be in. None stands for a file that was not asked for.
    """
    read, written = {Path(path).resolve() for path in inputs if path is not None}, set()
    for path in paths:
        if path is None or (path.exists() and not path.is_file()):  # a device or a pipe takes all that is written
            continue
        place = path.resolve()
        if place in read:
            raise InputError(f"{str(path)!r} is a file this command reads, and would be overwritten: name another")
        if place in written:
            raise InputError(f"{str(path)!r} is named for two results, and the second would overwrite the first")
        written.add(place)
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

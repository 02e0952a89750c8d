"""Stages on disk: skipped when finished with the same inputs, resumed when they were interrupted, else done anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlme.errors import InputError
from rlme.folders import replace_file

STATE = "stage.json"


def fingerprint(*inputs: Any) -> str:
    """A short digest of JSON-ready inputs."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def source_fingerprint(source: str, revision: str | None) -> str:
    """Of a model: its name on the hub, or names, sizes and times of the local files."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    return fingerprint(source, revision, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])


class Stage:
    """One stage's folder, with what it was made from in `stage.json`."""

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder = folder
        self.inputs = inputs

    @property
    def done(self) -> bool:
        """Whether it was finished with the same inputs."""
        state = self._state()
        return state.get("inputs") == self.inputs and bool(state.get("done"))

    @property
    def stale(self) -> bool:
        """Whether the folder holds results of other inputs, which `begin` will remove."""
        return self._state().get("inputs") not in (None, self.inputs)

    @property
    def info(self) -> dict[str, Any]:
        """What `finish` was told."""
        found = self._state().get("info", {})
        return found if isinstance(found, dict) else {}

    def begin(self) -> bool:
        """Ready the folder. True: it holds an interrupted attempt with the same inputs, to be continued.

        Results of other inputs are removed: they would not belong to this configuration.
        """
        if self._state().get("inputs") == self.inputs:
            return True
        if self.folder.exists():
            if any(self.folder.iterdir()) and not (self.folder / STATE).is_file():
                raise InputError(f"{self.folder} is not a stage of `rlme align`: choose another output folder.")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._write({"inputs": self.inputs, "done": False})
        return False

    def finish(self, info: Mapping[str, Any], *, done: bool = True) -> None:
        """Mark it done (False: the next run goes on with it); written last, by one rename."""
        self._write({"inputs": self.inputs, "done": done, "info": dict(info)})

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, state: Mapping[str, Any]) -> None:
        replace_file(self.folder / STATE, json.dumps(state, indent=2) + "\n")


class Lines:
    """A JSONL file that is appended to chunk by chunk; a line cut off by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        return list(self._whole())

    def resume(self, chunk: int) -> int:
        """Drop what is not a whole chunk of `chunk` lines; returns how many lines are left."""
        rows = self.read()
        kept = len(rows) // chunk * chunk
        self.rewrite(rows[:kept])
        return kept

    def rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the whole file, by one rename."""
        replace_file(self.path, "".join(_line(row) for row in rows))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows and flush them to disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def _whole(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"

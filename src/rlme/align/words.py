"""What a run of `rlme align` says on the console."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlme.align.costs import Expected
from rlme.align.stage import Stage
from rlme.evaluators.spending import estimates
from rlme.label_mass import LabelMass
from rlme.progress import SlowProgress


class Words:
    """Sentences and progress bars; a warning is given once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._warned: set[tuple[str, str]] = set()

    def say(self, text: str, style: str | None = None) -> None:
        """One line."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def estimate(self, expected: Expected, how: str, where: str, why: str) -> None:
        """What the judges behind endpoints will take."""
        for text, style in estimates(expected, how=how, where=where, why=why):
            self.say(text, style)

    def skip(self, stage: Stage, title: str) -> bool:
        """Whether the stage is done; also says so, or that it has to be done anew."""
        if stage.done:
            self.say(f"{title}: done before, skipped")
        elif stage.stale:
            self.say(f"{title}: its inputs have changed, done anew")
        return stage.done

    def finish(self, stage: Stage, title: str, info: dict[str, Any], *, done: bool = True) -> None:
        """Write what the stage came to, and say it."""
        stage.finish(info, done=done)
        shown = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in info.items() if v not in (None, {}, []))
        self.say(f"{title}: {shown}")

    def warn(self, found: LabelMass, threshold: float) -> None:
        """Judges with little probability on their labels."""
        for key, text in found.warnings(threshold).items():
            if key not in self._warned:
                self._warned.add(key)
                self.say(text, "yellow")

    def bar(self, title: str, total: int, start: int) -> _Bar:
        """Progress from `start` to `total`."""
        return _Bar(self.console, title, total, start)


class _Bar:
    """A progress bar with the time left, as a context that gives its advance function."""

    def __init__(self, console: Console, title: str, total: int, start: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = SlowProgress(*columns, *times, console=console, transient=True)
        self.task = self.progress.add_task(title, total=total, completed=start)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda n: self.progress.advance(self.task, n)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{_short(v)} {k}" for k, v in value.items()) + ")"
    return str(value)

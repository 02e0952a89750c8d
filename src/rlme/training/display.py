"""What a person sees while a run goes: a progress line with ETA, and now and then a few completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlme.progress import SlowProgress

Record = dict[str, Any]

SHOWN = 3  # completions in each example panel


class _Bar(SlowProgress):
    """The bar with its stage, and the last step's numbers below it: on one line they would push each other out."""

    summary = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.summary, style="dim")


class Display:
    """A live bar on a terminal; one line a step where output goes to a file."""

    def __init__(self, console: Console, *, steps: int, done: int, show_every: int) -> None:
        self.console, self.steps, self.show_every = console, steps, show_every
        self._started, self._first = time.monotonic(), done
        self.progress = _Bar(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stage]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=done, stage="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def stage(self, name: str) -> None:
        """What the step is busy with now (on a terminal)."""
        self.progress.update(self.task, stage=f"{name} ...")

    def update(self, record: Record, rows: list[Record]) -> None:
        """After each update (and the measurement before the first)."""
        step, line = record["step"], summary(record)
        if step == self._first:
            self._started = time.monotonic()  # the measurement before the first step is no measure of a step
        self.progress.summary = line
        self.progress.update(self.task, completed=step, stage="")
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}{self._left(step)}  {line}", markup=False, soft_wrap=True)
        if alarm := record.get("alarm"):
            self.console.print(Panel(Text(alarm), title=f"alarm at step {step}", border_style="red"))
        if rows and self.show_every and (step % self.show_every == 0 or step == 1):
            self.console.print(examples(rows, step))

    def _left(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return ""
        seconds = int((time.monotonic() - self._started) / done * (self.steps - step))
        return f" ({seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left)"


def summary(record: Record) -> str:
    """reward, gold accuracy, label mass, lengths, speed and where the time goes, in one line."""
    parts = []
    if "reward" in record:
        parts.append(f"reward {record['reward']:.3f}")
    if "reward/judged" in record:
        parts.append(f"judged {record['reward/judged']:.3f}")
    for key, name in (("gold/accuracy", "gold"), ("eval/gold/accuracy", "held-out gold")):
        if key in record:
            parts.append(f"{name} {record[key]:.2f}")
    if "eval/reward" in record:
        parts.append(f"held-out reward {record['eval/reward']:.3f}")
    masses = [v for k, v in record.items() if k.startswith("judge/") and k.endswith("/mass")]
    if masses:
        parts.append(f"mass {sum(masses) / len(masses):.2f}")
    if "completions/mean_tokens" in record:
        parts.append(f"{record['completions/mean_tokens']:.0f} tokens")
    if record.get("reward_missing"):
        parts.append(f"{record['reward_missing']:.0%} without reward")
    if "tokens_per_second/sample" in record:
        parts.append(f"{record['tokens_per_second/sample']:.0f} tok/s")
    times = [(s, record[f"time/{s}"]) for s in ("sample", "judge", "update", "measure") if f"time/{s}" in record]
    if times:
        parts.append(" ".join(f"{stage} {seconds:.1f}s" for stage, seconds in times))
    return " · ".join(parts)


def examples(rows: list[Record], step: int) -> Panel:
    """The best, middle and worst completion of the first group whose rewards differ, with every judgement.

    Completions are untrusted: they are shown as `Text`, never read as markup, without control characters.
    """
    groups: dict[Any, list[Record]] = {}
    for row in rows:
        groups.setdefault(row.get("group", row.get("prompt_index", 0)), []).append(row)
    ranked = [sorted((r for r in g if r["reward"] is not None), key=lambda r: -r["reward"]) for g in groups.values()]
    ranked = [g for g in ranked if g] or [rows[:1]]
    group = next((g for g in ranked if len(g) > 1 and g[0]["reward"] > g[-1]["reward"]), ranked[0])
    chosen = group if len(group) <= SHOWN else [group[0], group[len(group) // 2], group[-1]]
    table = Table(box=None, show_header=True, padding=(0, 1), expand=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("judgements", max_width=26, overflow="fold")  # long names wrap: the completion needs the room
    table.add_column("completion", ratio=1)
    for row in chosen:
        verdicts = "\n".join(
            f"{j['question'][:24]} ({j['evaluator']}): " + (j["failure"] if j["failure"] else f"{j['probability']:.3f}")
            for j in row["judgements"]
        )
        gold = "" if row["correct"] is None else "right" if row["correct"] else "wrong"
        reward = "missing" if row["reward"] is None else f"{row['reward']:.3f}"
        table.add_row(f"{reward}\n{gold}", Text(verdicts), Text(plain(row["completion"], 400)))
    prompt = Text(plain(group[0]["prompt"][-300:], 300), style="dim")
    return Panel(Group(prompt, table), title=f"step {step}: best, middle and worst of one group", title_align="left")


def print_table(console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; where it is wider than the terminal a paragraph for each row, so that nothing is cut off."""
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
        return
    console.print(Text(f"\n{title}", style="italic"))
    for row in rows:
        parts = [Text.assemble((f"{name} ", "dim"), cell) for name, cell in zip(names, row, strict=True) if cell]
        console.print(Text(" · ", style="dim").join(parts))


def plain(text: str, limit: int) -> str:
    """Text that cannot move the cursor or colour the screen, shortened with a mark."""
    safe = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"

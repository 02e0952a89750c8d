"""What training shows on a terminal of 80 columns: nothing pushes anything else out."""

from io import StringIO
from typing import Any

from rich.console import Console

from rlme.training.display import Display, examples, print_table


def text_of(console: Console) -> str:
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def row(**changes: Any) -> dict[str, Any]:
    judged = {"question": "Is every claim supported by the context?", "evaluator": "Qwen2.5-Coder-1.5B-Instruct"}
    return {
        "prompt_index": 0,
        "prompt": "How?",
        "completion": "a completion that can be read",
        "reward": -1.0,
        "correct": None,
        "judgements": [{**judged, "failure": None, "probability": 0.5}],
        **changes,
    }


def test_long_names_leave_room_for_the_completion() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(examples([row(), row(reward=-2.0)], 1))
    assert "a completion that can be read" in text_of(console)


def test_the_bar_stays_when_the_numbers_are_many() -> None:
    console = Console(
        file=StringIO(), width=80, height=24, force_terminal=True, legacy_windows=False, color_system=None
    )
    record = {"step": 3, "reward": -1.2, "gold/accuracy": 0.5, "eval/gold/accuracy": 0.4, "eval/reward": -1.3}
    record |= {"judge/a/q/mass": 0.9, "completions/mean_tokens": 40.0, "tokens_per_second/sample": 123.0}
    record |= {f"time/{stage}": 10.0 for stage in ("sample", "judge", "update", "measure")}
    with Display(console, steps=12, done=0, show_every=0) as display:
        display.stage("judge")
        display.update(record, [])
    text = text_of(console)
    assert "3/12" in text and "left" in text and "…" not in text
    assert "update 10.0s" in " ".join(text.split())


def test_a_table_wider_than_the_terminal_becomes_paragraphs() -> None:
    for width, boxed in ((80, False), (300, True)):
        console = Console(file=StringIO(), width=width)
        print_table(console, "rates", ["a long name of a column"] * 6, [["some value of it", *"[/]ab"]])
        assert ("┃" in text_of(console)) == boxed
        assert "some value of it" in text_of(console)

"""Several processes, one run: what would leave the others waiting is settled between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rlme.errors import RunStopped

T = TypeVar("T")


def dealt(items: Sequence[T], accelerator: Any) -> tuple[list[T], int]:
    """This process's items, dealt out in turns, and how many they are. The list may be longer by one that another
    process holds too: all have lists of one length, because each step over them may wait for the other processes."""
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = list(items[rank::world])
    return mine + list(items[: -(-len(items) // world) - len(mine)]), len(mine)


def everywhere(items: list[T], accelerator: Any) -> list[T]:
    """What all processes have, one after the other. All have to ask."""
    if accelerator is None or accelerator.num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))


@contextmanager
def stopping_together(accelerator: Any = None) -> Iterator[None]:
    """What stops one process inside (`RunStopped`) stops all of them at its end. All have to come here."""
    stopped: str | None = None
    try:
        yield
    except RunStopped as error:
        stopped = str(error)
    for reason in everywhere([stopped], accelerator):
        if reason is not None:
            raise RunStopped(reason)


def leave_together() -> None:
    """End what the processes share, before any of them exits: one that finds another gone while it still holds
    connections to it is aborted, whatever it was about to say or to write. All have to come here."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()

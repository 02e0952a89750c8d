"""Which prompts each batch holds: a function of the seed alone, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PromptOrder(Sampler[int]):
    """Indices of prompts, each repeated `group_size` times, batch after batch for the whole run.

    The prompts come in fresh permutations, one pass after another without a gap, so any number of prompts serves any
    batch size; none comes twice in a batch, unless there are fewer than it holds. (TRL's sampler drops the rest of each
    pass, and its order after the first depends on how often it was started, which a resumed run cannot repeat.) Each
    batch is yielded `repeats` times: TRL asks for it once per micro-step and uses the first.
    """

    def __init__(
        self,
        *,
        prompts: int,
        prompts_per_batch: int,
        group_size: int,
        repeats: int,
        batches: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.prompts, self.prompts_per_batch, self.group_size = prompts, prompts_per_batch, group_size
        self.repeats, self.batches, self.seed, self.shuffle = repeats, batches, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go on where the epochs before have ended (Transformers starts the sampler anew for each)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.repeats * self.prompts_per_batch * self.group_size

    def __iter__(self) -> Iterator[int]:
        stream, waiting = self._stream(), list[int]()
        for number in range((self.epoch + 1) * self.batches):
            batch: list[int] = []
            twice: list[int] = []  # where two passes meet: for the next batch
            while len(batch) < self.prompts_per_batch:
                index = waiting.pop(0) if waiting else next(stream)
                again = index in batch and self.prompts >= self.prompts_per_batch
                (twice if again else batch).append(index)
            waiting = twice + waiting
            if number < self.epoch * self.batches:
                continue
            for _ in range(self.repeats):
                for index in batch:
                    yield from [index] * self.group_size

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from (
                torch.randperm(self.prompts, generator=generator).tolist() if self.shuffle else range(self.prompts)
            )

"""The order and the crops of training pictures, as functions of the seed, the epoch and the place only.

    seed, epoch --> a permutation, and a seed for each of its places --> every ranks-th place: (index, seed), (index, seed), ...

They do not depend on earlier random numbers, on worker processes or on the number of ranks. So a resumed training continues at the next
picture, even with another batch size or number of ranks; with the same ones, it continues as if it had never stopped.
"""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

Place = tuple[int, int]  # index of a picture, seed of its random numbers


class Shuffled(DistributedSampler[Place]):
    """The places of one rank; a remainder at the end is dropped. It is a DistributedSampler, because Lightning keeps those and sets their
    epoch.

    Attributes:
        start: number of places, over all ranks, that the next iteration skips at the beginning of the epoch.
    """

    def __init__(self, pictures: Dataset[Any], ranks: int, rank: int, seed: int) -> None:
        super().__init__(pictures, num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.start = 0

    def __iter__(self) -> Iterator[Place]:  # type: ignore[override]
        assert isinstance(self.dataset, Sized)
        count = len(self.dataset)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(count, generator=generator)
        seeds = torch.randint(2**62, (count,), generator=generator)
        # neighbouring places belong to one global batch
        mine = slice(self.start + self.rank, count - (count - self.start) % self.num_replicas, self.num_replicas)
        return iter(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class InTurn(DistributedSampler[int]):
    """All pictures in order, each on exactly one rank; the first ranks may have one more. torch's own sampler repeats pictures if ranks do
    not divide their number."""

    def __init__(self, pictures: Dataset[Any], ranks: int, rank: int) -> None:
        super().__init__(pictures, num_replicas=ranks, rank=rank, shuffle=False)
        assert isinstance(pictures, Sized)
        self._mine = range(rank, len(pictures), ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)

    def __len__(self) -> int:
        return len(self._mine)


def derived_seed(*numbers: int) -> int:
    """A seed computed from non-negative numbers and statistically independent of the seeds of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def random_numbers(seed: int | None) -> Iterator[None]:
    """Seeds torch's CPU random numbers within the block and restores their state afterwards. None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch accelerators
        yield

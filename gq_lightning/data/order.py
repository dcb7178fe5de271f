"""The order of training pictures, and how each is cropped: functions of the seed, the epoch and the place alone.

    seed, epoch --> a permutation, and a seed for each of its places --> every ranks-th place: (index, seed), (index, seed), ...

It does not depend on what was drawn before, on worker processes or on how many ranks share the places. So a resumed training goes on
at the picture after the last, on as many ranks and with as large batches as it now has; where these are the same, as if it had never
stopped.
"""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

Place = tuple[int, int]  # index of a picture, seed of its random numbers


class Shuffled(DistributedSampler[Place]):
    """The places of one rank. It is a DistributedSampler, because Lightning does not replace those and sets their epoch.

    Args:
        pictures: the training set.
        ranks: processes that share each batch; the last places, which do not divide by them, are dropped.
        rank: this one.
        seed: of all epochs.

    Attributes:
        start: number of the epoch's first places, those of all ranks, that the next iteration skips.
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
        # places side by side belong to one global batch
        mine = slice(self.start + self.rank, count - (count - self.start) % self.num_replicas, self.num_replicas)
        return iter(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class InTurn(DistributedSampler[int]):
    """All pictures in order, each on one of the ranks; torch's own sampler repeats the first ones where ranks do not divide their number.

    Args:
        pictures: the evaluation set.
        ranks: processes that share it; the first ones may have a picture more than the others.
        rank: this one.
    """

    def __init__(self, pictures: Dataset[Any], ranks: int, rank: int) -> None:
        super().__init__(pictures, num_replicas=ranks, rank=rank, shuffle=False)
        assert isinstance(pictures, Sized)
        self._mine = range(rank, len(pictures), ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)

    def __len__(self) -> int:
        return len(self._mine)


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of these numbers, none negative, and unrelated to the seeds of others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def random_numbers(seed: int | None) -> Iterator[None]:
    """Within, torch's random numbers on the CPU begin at `seed`; afterwards they go on as before. None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for accelerators too
        yield

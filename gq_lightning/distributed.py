"""What a part has to ask of torch.distributed, where it may also run alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Within, the processes that torchrun has begun know one another, over gloo; a process that was begun alone stays alone."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized()
    if not alone:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if not alone:
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when every rank has called it."""
    if is_distributed():
        dist.barrier()


def rank() -> int:
    """This one's number, 0 where there is no other."""
    return dist.get_rank() if is_distributed() else 0


def ranks() -> int:
    """How many there are, this one included."""
    return dist.get_world_size() if is_distributed() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each rank's tensor of one shape, without gradient; `values` itself, detached, where there is one rank."""
    values = values.detach()
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def any_over_ranks(flags: Tensor) -> Tensor:
    """1 where any rank's flag (uint8, of one shape) is 1; `flags` itself where there is one rank."""
    if not is_distributed():
        return flags
    flags = flags.clone()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows (N, ...) of every rank, one rank after the other, without gradient; ranks may have different numbers of them."""
    rows = rows.detach()
    if not is_distributed():
        return rows
    count = torch.tensor(len(rows), device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(ranks())]
    dist.all_gather(counts, count)
    # ranks exchange tensors of one shape: all are padded to the longest
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, counts, strict=True)])

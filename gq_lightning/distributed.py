"""Helpers over torch.distributed that also work in a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Joins the processes that torchrun has started in a gloo group for the duration of the block; does nothing in a single process."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized()
    if not alone:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if not alone:
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Waits until every rank has called this."""
    if is_distributed():
        dist.barrier()


def rank() -> int:
    """Number of this rank; 0 in a single process."""
    return dist.get_rank() if is_distributed() else 0


def ranks() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if is_distributed() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over ranks of tensors of equal shape, without gradient; in a single process, `values` detached."""
    values = values.detach()
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all ranks, in rank order, without gradient. N may differ between ranks."""
    rows = rows.detach()
    if not is_distributed():
        return rows
    count = torch.tensor(len(rows), device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(ranks())]
    dist.all_gather(counts, count)
    # all_gather needs equal shapes, so every rank pads to the longest
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, counts, strict=True)])

"""What a part has to ask of torch.distributed, where it may also run alone."""

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each rank's tensor of one shape, without gradient; `values` itself, detached, where there is one rank."""
    values = values.detach()
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()

"""Loads the tokenizer for a tool, and the prior with which it codes tokens."""

import os
from typing import TYPE_CHECKING

import torch

from gq_lightning.errors import UserError
from gq_lightning.tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from gq_lightning.priors.coding import PriorCoder

MOST_THREADS = 1024  # starting more may kill the process


def load_tokenizer(name: str, device: str, threads: int | None) -> ImageTokenizer:
    """The tokenizer from a folder or the hub, on a device.

    Args:
        name: see `ImageTokenizer.from_pretrained`.
        device, threads: see `choose_device`.

    Raises:
        UserError: there is no such tokenizer or no such device.
    """
    chosen = choose_device(device, threads)
    return ImageTokenizer.from_pretrained(name).to(chosen)


def choose_device(device: str, threads: int | None) -> torch.device:
    """The device by its name, tried out; sets the number of threads.

    Args:
        device: a torch device, or "auto" for a GPU if there is one.
        threads: CPU threads; None keeps torch's setting.

    Raises:
        UserError: there is no such device.
    """
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise UserError(f"--threads {threads}: give 1 to {MOST_THREADS}, ideally the number of cores")
        torch.set_num_threads(threads)
    if device == "auto":
        # under torchrun each rank has its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # fails for a missing device and for "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--device {device}: cannot be used here ({reason}): try cpu") from error
    return torch.device(device)


def load_coder(prior: str | None, tokenizer: ImageTokenizer | None, source: str) -> "PriorCoder | None":
    """The coder of a prior from a folder or the hub, None for no prior.

    Args:
        tokenizer: whose tokens the prior must have been trained on; None accepts any.
        source: the tokenizer's name in messages.

    Raises:
        UserError: there is no such prior, or it belongs to another tokenizer.
    """
    if prior is None:
        return None
    from gq_lightning.priors import Prior
    from gq_lightning.priors.coding import PriorCoder
    from gq_lightning.priors.generation import check_fit

    loaded = Prior.from_pretrained(prior)
    if tokenizer is not None:
        check_fit(loaded, tokenizer, source)
    return PriorCoder(loaded)

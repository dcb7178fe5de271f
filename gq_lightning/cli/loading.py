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
    """The tokenizer of a name, see `ImageTokenizer.from_pretrained`, on a device, see `choose_device`. Raises UserError if there is
    none."""
    chosen = choose_device(device, threads)
    return ImageTokenizer.from_pretrained(name).to(chosen)


def choose_device(device: str, threads: int | None) -> torch.device:
    """A torch device by its name, tried out; `auto` is a GPU if there is one. Sets the number of CPU threads, unless it is None. Raises
    UserError if there is no such device."""
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
    """The coder of a prior from a folder or the hub, None for no prior. It must belong to the tokenizer, of which `source` is the name in
    messages; None accepts any. Raises UserError."""
    if prior is None:
        return None
    from gq_lightning.priors import Prior
    from gq_lightning.priors.coding import PriorCoder
    from gq_lightning.priors.generation import check_fit

    loaded = Prior.from_pretrained(prior)
    if tokenizer is not None:
        check_fit(loaded, tokenizer, source)
    return PriorCoder(loaded)

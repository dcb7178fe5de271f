"""The tokenizer that tools work with."""

import os

import torch

from gq_lightning.errors import UserError
from gq_lightning.tokenizer import ImageTokenizer

MOST_THREADS = 1024  # beyond, starting them may end the process


def load_tokenizer(name: str, device: str, threads: int | None) -> ImageTokenizer:
    """The tokenizer of a folder or of the hub on a device.

    Args:
        name: see `ImageTokenizer.from_pretrained`.
        device: torch's name of one, or "auto": a GPU where there is one.
        threads: of the CPU; None leaves them to torch.

    Raises:
        UserError: there is no such tokenizer or no such device.
    """
    if threads:
        if threads > MOST_THREADS:
            raise UserError(f"--threads {threads}: give at most {MOST_THREADS}, best the number of cores")
        torch.set_num_threads(threads)
    if device == "auto":
        # of the ranks that torchrun has begun each has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # what is not there, or holds no numbers, says so here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--device {device}: cannot be used here ({reason}): try cpu") from error
    return ImageTokenizer.from_pretrained(name).to(device)

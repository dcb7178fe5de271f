"""Loads the tokenizer from a training checkpoint."""

from pathlib import Path

from gq_lightning.construction import build
from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.tokenizer.checkpoint_file import read_checkpoint
from gq_lightning.tokenizer.module import ImageTokenizer

# of the tokenizer's entries in the checkpoint's state_dict
PREFIX = "tokenizer."


def load_checkpoint(path: Path) -> ImageTokenizer:
    """The tokenizer of a checkpoint, or of the last checkpoint in a run's folder. Raises UserError if there is no checkpoint, or this
    package did not write it."""
    if path.is_dir():
        run = RunFolder(path)
        existing = [candidate for candidate in (run.last, *sorted(run.checkpoints.glob("*.ckpt"))) if candidate.is_file()]
        if not existing:
            raise UserError(f"{path}: no checkpoints/*.ckpt in this folder; give a run's folder or a checkpoint")
        path = existing[0]
    try:
        checkpoint = read_checkpoint(path, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    try:
        description = checkpoint["tokenizer"]
        recipe = description["init_args"]["quantizer"]
        # copied from the mapped file, which may be overwritten later
        state = {name.removeprefix(PREFIX): value.clone() for name, value in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of gq_lightning (no {error}): give one that fit wrote") from error
    if (name := "quantizer.codebook_fingerprint") in state:
        # a conversion draws the codebook again from its recipe; no token depends on the codebook of the training
        state[name] = build(Quantizer, recipe, str(path)).state_dict()["codebook_fingerprint"]  # type: ignore[type-abstract]
    return ImageTokenizer.from_description(description, state, source=str(path))

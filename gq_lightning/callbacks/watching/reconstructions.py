"""Shows held-out images and their reconstructions at every validation."""

import contextlib
import warnings
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from torch import Tensor

from gq_lightning.data import BrokenImage, PictureSet, sides
from gq_lightning.data.pictures.reading import resize_shorter
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import draw, evenly, some_images
from gq_lightning.evaluation.panel import panel
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.tokens.codec import fit_picture
from gq_lightning.training.module import TokenizerTraining, last_step

NAME = "reconstructions"
# longest side of a whole picture, in pixels; larger pictures are resized, so that validation stays quick
LONGEST = 512


class Reconstructions(Callback):
    """Logs images to every logger that supports them: TensorBoard, Weights & Biases, MLflow, Comet.

    They are a grid original | Gaussian | quantised of evaluated images, and whole pictures with maps of their errors and bits.

    Args:
        columns: number of images, spread evenly over the evaluation set.
        whole: number of whole pictures, likewise.
    """

    def __init__(self, columns: int = 4, whole: int = 2) -> None:
        self.columns, self.whole = columns, whole
        self._images: Tensor | None = None
        self._pictures: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not any(map(takes_pictures, trainer.loggers)):
            return
        assert isinstance(pl_module, TokenizerTraining)
        tokenizer = pl_module.tokenizer
        if self._images is None:
            pictures = trainer.datamodule.evaluation_set()  # type: ignore[attr-defined]
            self._images = some_images(pictures, self.columns)
            self._pictures = whole_pictures(pictures, self.whole, tokenizer)
        images = self._images.to(pl_module.device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="images hold nothing below 0")
            shown = {NAME: draw(images, tokenizer.reconstruct(images), scale=2 if images.shape[-1] <= 128 else 1)}
            for number, picture in enumerate(self._pictures):
                result = tokenizer.reconstruct(picture[None].to(pl_module.device))
                shown[f"whole/{number}"] = panel(picture, result.images[0], None if result.bits is None else result.bits[0])
        for logger in trainer.loggers:
            for name, image in shown.items():
                log_picture(logger, name, image, last_step(trainer))


def whole_pictures(pictures: PictureSet, count: int, tokenizer: ImageTokenizer) -> list[Tensor]:
    """`count` pictures, (3, H, W) in [-1, 1] on the tokenizer's grid; those that cannot be read or are too small are left out."""
    found: list[Tensor] = []
    for index in evenly(len(pictures), count):
        with contextlib.suppress(BrokenImage, UserError):
            picture = pictures.whole(index)
            if (longest := max(picture.size)) > LONGEST:
                smaller = resize_shorter(picture, max(min(picture.size) * LONGEST // longest, 1))
                height, width = sides(tokenizer.fixed_image_size or 1)
                fits = smaller.height >= height and smaller.width >= width
                picture = smaller if fits else resize_shorter(picture, (height, width))
            found.append(fit_picture(picture, "crop", tokenizer.downsampling, tokenizer.fixed_image_size, None)[0])
    return found


def takes_pictures(logger: Logger) -> bool:
    targets = (logger, getattr(logger, "experiment", None))
    return isinstance(logger, TensorBoardLogger) or any(hasattr(target, "log_image") for target in targets)


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Logs an image to any supported logger; others are ignored."""
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, picture, key=name, step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(picture, name=name, step=step)

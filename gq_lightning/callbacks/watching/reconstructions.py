"""Logs a grid original | Gaussian | quantised of fixed images at every validation."""

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from torch import Tensor

from gq_lightning.evaluation.evaluate import draw, some_images
from gq_lightning.training.module import TokenizerTraining, last_step

NAME = "reconstructions"


class Reconstructions(Callback):
    """Logs the grid to every logger that supports images: TensorBoard, Weights & Biases, MLflow, Comet.

    Args:
        columns: images, spread evenly over the evaluation set.
    """

    def __init__(self, columns: int = 8) -> None:
        self.columns = columns
        self._images: Tensor | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not any(map(takes_pictures, trainer.loggers)):
            return
        assert isinstance(pl_module, TokenizerTraining)
        if self._images is None:
            self._images = some_images(trainer.datamodule.evaluation_set(), self.columns)  # type: ignore[attr-defined]
        images = self._images.to(pl_module.device)
        with torch.no_grad():
            picture = draw(images, pl_module.tokenizer.reconstruct(images), scale=2 if images.shape[-1] <= 128 else 1)
        for logger in trainer.loggers:
            log_picture(logger, NAME, picture, last_step(trainer))


def takes_pictures(logger: Logger) -> bool:
    return any(hasattr(target, "log_image") for target in (logger, _experiment(logger))) or isinstance(logger, TensorBoardLogger)


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Logs an image to any supported logger; others are ignored."""
    experiment = _experiment(logger)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, picture, key=name, step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(picture, name=name, step=step)


def _experiment(logger: Logger) -> object:
    return getattr(logger, "experiment", None)

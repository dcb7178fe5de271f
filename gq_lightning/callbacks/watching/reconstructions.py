"""Pictures where people would rather look than read: a grid original | Gaussian | quantised of fixed images, at every validation."""

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gq_lightning.evaluation.evaluate import draw, some_images
from gq_lightning.training.module import TokenizerTraining


class Reconstructions(Callback):
    """Logs the grid to TensorBoard.

    Args:
        columns: images, spread evenly over the evaluation set.
    """

    def __init__(self, columns: int = 8) -> None:
        self.columns = columns
        self._images: Tensor | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TokenizerTraining)
        if self._images is None:
            self._images = some_images(trainer.datamodule.evaluation_set(), self.columns)  # type: ignore[attr-defined]
        images = self._images.to(pl_module.device)
        with torch.no_grad():
            picture = draw(images, pl_module.tokenizer.reconstruct(images), scale=2 if images.shape[-1] <= 128 else 1)
        for logger in boards:
            logger.experiment.add_image("reconstructions", np.asarray(picture), trainer.global_step, dataformats="HWC")

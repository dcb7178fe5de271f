"""Makes a resumed training identical to an uninterrupted one, to the bit.

Three things are needed. Pictures and crops depend only on their place (`data.order`). With this callback, so do the random numbers of a
training step, such as posterior samples. And every checkpoint, whenever it is written, records its progress in the same way.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gq_lightning.data.order import derived_seed
from gq_lightning.errors import UserError
from gq_lightning.lightning_internals import as_after_a_batch, begin_after_resuming, is_fitting


class ExactResume(Callback):
    """Seeds each training batch by (seed, epoch, batch, rank). No generator state needs to be saved, and random numbers used by validation,
    logging or loaders have no effect. Each rank has its own random numbers."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        begin_after_resuming(trainer, trainer.datamodule.batches_before(trainer.current_epoch))  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = derived_seed(trainer.datamodule.seed, trainer.current_epoch, batch_idx, trainer.global_rank)  # type: ignore[attr-defined]
        # on a CPU, torch.manual_seed would also queue, at some cost, a seed for later accelerators
        (torch.default_generator if pl_module.device.type == "cpu" else torch).manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        as_after_a_batch(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        seed = checkpoint.get(type(trainer.datamodule).__qualname__, {}).get("seed")  # type: ignore[attr-defined]
        if is_fitting(trainer) and trainer.is_global_zero and seed not in (None, torch.initial_seed()):
            raise UserError(
                f"seed_everything {torch.initial_seed()}: the training began with {seed}, which determines its order of pictures: "
                f"give --seed_everything {seed}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained:
            return
        # resumed with nothing left to train: Lightning skips the hook that puts averaged weights in place
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, Checkpoint):
                callback.on_train_end(trainer, pl_module)

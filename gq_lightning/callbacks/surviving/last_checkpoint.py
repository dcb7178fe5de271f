"""Writes checkpoints/last.ckpt, for `--ckpt_path last`: at regular steps, after validations, on a signal to stop, and at the end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder
from gq_lightning.lightning_internals import is_fitting, validation_is_due


class LastCheckpoint(Checkpoint):
    """One file next to the best checkpoint, overwritten each time. It is never written in the middle of an accumulation, because a
    checkpoint does not hold gradients. If a validation is due, it is written after it, so that a resumed run misses no validation.

    Args:
        every_n_train_steps: largest number of steps between two checkpoints, which is the most that a killed run loses.
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"last.every_n_train_steps {every_n_train_steps}: give a positive number")
        self.every_n_train_steps = every_n_train_steps
        self._step, self._complete = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._complete = trainer.global_step, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._complete = trainer.global_step != self._step
        self._step = trainer.global_step
        if not self._complete or validation_is_due(trainer):
            return
        # not in on_train_end, when averaged weights have replaced the trained ones
        last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        end = self._step == trainer.max_steps or trainer.should_stop or trainer.received_sigterm or last_epoch
        if end or self._step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer) and not trainer.sanity_checking and self._complete:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(last_checkpoint(trainer), weights_only=False)


def last_checkpoint(trainer: Trainer) -> Path:
    """Path of the last checkpoint, in the folder of the best."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    last = RunFolder(trainer.default_root_dir).last
    return Path((folders[0] if folders else None) or last.parent) / last.name

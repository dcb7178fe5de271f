"""checkpoints/last.ckpt, from which `--ckpt_path last` resumes: every so many steps, after validations, when told to stop, at the end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder
from gq_lightning.lightning_internals import is_fitting, validation_is_due


class LastCheckpoint(Checkpoint):
    """One file, written anew each time, beside the best checkpoint; never in the middle of an accumulation, whose gradients no checkpoint
    holds. Where a validation is due it is written after it, so that a resumed run lacks no validation.

    Args:
        every_n_train_steps: steps between two of them, at most: what a killed run loses.
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
        # the end of training would be too late: averaged weights have taken the place of those that train
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
    """Where it is, beside the best."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    last = RunFolder(trainer.default_root_dir).last
    return Path((folders[0] if folders else None) or last.parent) / last.name

"""Lightning's internals: all that this package touches of what its documentation does not promise. Written for Lightning 2.6.6.

Each function says in our words what the rest of the package wants done. pyproject.toml admits Lightning 2.6 alone, and a test names
those of `INTERNALS` that another version has lost.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gq_lightning.errors import UserError

__all__ = ["MisconfigurationException", "SIGTERMException"]

# what is touched, by the kind of object that has it
INTERNALS = {
    "Trainer": (
        "_accelerator_connector.cluster_environment",
        "_checkpoint_connector._restore_modules_and_callbacks",
        "_checkpoint_connector.restore_training_state",
        "_logger_connector.update_train_step_metrics",
        "_signal_connector.received_sigterm",
        "_signal_connector.register_signal_handlers",
        "fit_loop._data_fetcher",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop._broadcast_sigterm_tensor",
        "fit_loop.epoch_loop._should_check_val_fx",
        "fit_loop.epoch_loop.batch_progress.current",
        "fit_loop.epoch_progress.current",
        "fit_loop.epoch_progress.increment_completed",
        "fit_loop.epoch_progress.increment_processed",
        "fit_loop.reset_restart_stage",
        "fit_loop.restarted_mid_epoch",
        "received_sigterm",
        "state.fn",
        "strategy.launcher",
    ),
    "DDPStrategy": ("cluster_environment",),
    "SubprocessLauncher": ("kill",),
    "LightningOptimizer": ("_on_after_step", "_on_before_step"),
    "LightningCLI": ("_get", "_parse_ckpt_path"),
    "RichProgressBar": ("_get_train_description", "_stop_progress"),
}
# and of the progress that a checkpoint holds
PROGRESS = {
    "epoch_loop.batch_progress": ("current.completed", "current.ready", "total.completed", "total.ready"),
    "epoch_loop.state_dict": ("_batches_that_stepped",),
    "epoch_progress": ("current.completed", "current.processed", "current.ready", "total.completed", "total.processed", "total.ready"),
}


def is_fitting(trainer: Trainer) -> bool:
    """Whether a training is under way; its validations are part of it."""
    return trainer.state.fn == TrainerFn.FITTING


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that ends."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


# Options and checkpoints


class OwnOptions(LightningCLI):
    """Lightning's, whose options are those that its user gives. It would also take `hyper_parameters` from the file of --ckpt_path: a
    learning rate, or a class to import."""

    def _parse_ckpt_path(self) -> None:
        pass


def explain_restoring(trainer: Trainer) -> None:
    """Has it raise UserError, which names the checkpoint, where something in one does not fit the training; what it says itself stays."""
    connector = trainer._checkpoint_connector

    def explained(restore: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                restore(*args, **kwargs)
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # torch and each part of Lightning complain in their own way
                reason = " ".join(repr(error).replace("\\n", " ").split())[:300]
                raise UserError(
                    f"{trainer.ckpt_path}: it does not fit what is configured ({reason}): give the configs of its run, or another one"
                ) from error

        return wrapped

    connector._restore_modules_and_callbacks = explained(connector._restore_modules_and_callbacks)  # type: ignore[method-assign]
    connector.restore_training_state = explained(connector.restore_training_state)  # type: ignore[method-assign]


# Signals


def replace_signal_handlers(trainer: Trainer, listen: Callable[[], None]) -> None:
    """Has `listen` called where Lightning would set handlers of its own, before the training begins."""
    trainer._signal_connector.register_signal_handlers = listen  # type: ignore[method-assign]
    # which tells the other ranks of the first rank's signal before each batch, in the middle of a step
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def tell_to_stop(trainer: Trainer, told: bool) -> None:
    """Where `told`, the loop raises SIGTERMException when the callbacks of this batch, or of this validation, have been called."""
    trainer._signal_connector.received_sigterm = told


# Ranks


def cluster_environment(trainer: Trainer) -> Any:
    """Who began the ranks: Lightning's own environment, torchrun's, SLURM's, or None."""
    return getattr(trainer.strategy, "cluster_environment", None) or trainer._accelerator_connector.cluster_environment


def signal_launched_ranks(trainer: Trainer, number: int) -> None:
    """Sends a signal to the ranks that this process has begun."""
    if (launcher := trainer.strategy.launcher) is not None:
        launcher.kill(number)


# Steps and progress


def leave_uncounted(optimizer: LightningOptimizer) -> None:
    """Its steps are not among the trainer's `global_step`."""
    optimizer._on_before_step = optimizer._on_after_step = lambda: None


def begin_after_resuming(trainer: Trainer, batches: int) -> None:
    """To be called as training starts.

    Where a checkpoint was written after the last batch of an epoch, Lightning would count the next epoch as one that has begun already.

    Args:
        batches: of this epoch that are behind, as batches are now; there may have been others when the checkpoint was written.
    """
    loop = trainer.fit_loop
    if not loop.restarted_mid_epoch:
        return
    progress, all_batches = loop.epoch_loop.batch_progress.current, trainer.num_training_batches
    epochs = loop.epoch_progress.current.state_dict()
    ended = epochs["processed"] == epochs["ready"]
    if not ended and batches >= all_batches:  # what is left does not make a batch
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
        ended = True
    if ended:
        loop.reset_restart_stage()
    more = (int(all_batches) if ended else batches) - progress.ready
    progress.load_state_dict({name: count + more for name, count in progress.state_dict().items()})


def log_complete_steps(trainer: Trainer, complete: Callable[[], bool]) -> None:
    """To be called as training starts: what is logged goes to the loggers when a step is complete, not after each batch of it."""
    connector = trainer._logger_connector
    update = connector.update_train_step_metrics
    connector.update_train_step_metrics = lambda: update() if complete() else None  # type: ignore[method-assign]


def log_by_step(trainer: Trainer) -> None:
    """To be called within each batch: the loggers count optimizer steps, from 0, where Lightning would count batches."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1


def as_after_a_batch(checkpoint: dict[str, Any]) -> None:
    """Rewrites the progress in a checkpoint, in place, to what it is when `on_train_batch_end` is called.

    From there Lightning goes on at the next batch, whether or not the epoch ends there or a validation is due (which has been
    done). From progress as it is after a validation, or when the epoch or the training has ended, it counts logged steps, batches
    or epochs once too often or too rarely, depending on the trainer's settings.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    if not batches["total"]["ready"]:
        return  # nothing is trained yet
    for tracked in batches["total"], batches["current"]:
        tracked["completed"] = tracked["ready"] - 1
    for tracked in loop["epoch_progress"].values():
        tracked["processed"] = tracked["completed"] = tracked["ready"] - 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


class ProgressBar(RichProgressBar):
    """Lightning's, without the "Epoch 3/-2" of a run whose length is given in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        limited = self.trainer.max_epochs not in (None, -1)
        return super()._get_train_description(current_epoch) if limited else f"Epoch {current_epoch}, {self.trainer.max_steps} steps in all"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what the post-training hook prints is to be the last word
        self._stop_progress()

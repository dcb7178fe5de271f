"""The only module that uses undocumented parts of Lightning. Written for Lightning 2.6.6.

Each function offers one operation to the rest of the package. pyproject.toml allows only Lightning 2.6, and
tests/test_lightning_internals.py lists what is used here and names what an installed version lacks.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gq_lightning.errors import UserError

__all__ = ["MisconfigurationException", "SIGTERMException"]


def is_fitting(trainer: Trainer) -> bool:
    """Whether fit is running; its validations count as fitting."""
    return trainer.state.fn == TrainerFn.FITTING


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the current batch."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


# Options and checkpoints


class OwnOptions(LightningCLI):
    """LightningCLI that takes options from the user only. Lightning would also read `hyper_parameters` from the --ckpt_path file, which
    could set a learning rate or name a class to import."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, which records in `links` the options that are computed from others, with these."""
        parser = super().init_parser(**kwargs)
        link, self.links = parser.link_arguments, dict[str, str | Sequence[str]]()

        def recorded(source: str | tuple[str, ...], target: str, **settings: Any) -> None:
            self.links[target] = source
            link(source, target, **settings)

        parser.link_arguments = recorded  # type: ignore[method-assign, assignment]
        return parser

    def _parse_ckpt_path(self) -> None:
        pass

    def changed_options(self) -> str:
        """YAML of the subcommand's options without those at their defaults. The arguments of chosen classes are complete."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        return self._parser(self.subcommand).dump(config, skip_default=True)


def explain_restoring(trainer: Trainer) -> None:
    """Makes the trainer raise a UserError that names the checkpoint when the checkpoint does not fit the training."""
    connector = trainer._checkpoint_connector

    def explained(restore: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                restore(*args, **kwargs)
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # torch and Lightning raise many types here
                reason = " ".join(repr(error).replace("\\n", " ").split())[:300]
                raise UserError(
                    f"{trainer.ckpt_path}: does not fit the configured training ({reason}): give the configs of its run, or another file"
                ) from error

        return wrapped

    connector._restore_modules_and_callbacks = explained(connector._restore_modules_and_callbacks)  # type: ignore[method-assign]
    connector.restore_training_state = explained(connector.restore_training_state)  # type: ignore[method-assign]


# Signals


def replace_signal_handlers(trainer: Trainer, listen: Callable[[], None]) -> None:
    """Calls `listen` before training begins, in place of installing Lightning's own signal handlers."""
    trainer._signal_connector.register_signal_handlers = listen  # type: ignore[method-assign]
    # this would broadcast the first rank's signal before each batch, possibly in the middle of a step
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def tell_to_stop(trainer: Trainer, told: bool) -> None:
    """If `told`, the loop raises SIGTERMException after the callbacks of the current batch or validation."""
    trainer._signal_connector.received_sigterm = told


# Ranks


def cluster_environment(trainer: Trainer) -> Any:
    """The environment that started the ranks: Lightning's own, torchrun's, SLURM's, or None."""
    return getattr(trainer.strategy, "cluster_environment", None) or trainer._accelerator_connector.cluster_environment


def signal_launched_ranks(trainer: Trainer, number: int) -> None:
    """Sends a signal to the ranks that this process has started."""
    if (launcher := trainer.strategy.launcher) is not None:
        launcher.kill(number)


# Steps and progress


class Unprofiled(PassThroughProfiler):
    """Without a profiler, Lightning still opens a generator for each hook of each callback, some hundred a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.nothing


def profile_nothing(trainer: Trainer) -> None:
    """Replaces the profiler that a trainer has where none was asked for."""
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = Unprofiled()  # type: ignore[attr-defined]


def leave_uncounted(optimizer: LightningOptimizer) -> None:
    """Excludes the optimizer's steps from the trainer's `global_step`."""
    optimizer._on_before_step = optimizer._on_after_step = lambda: None


def begin_after_resuming(trainer: Trainer, batches: int) -> None:
    """Corrects the progress of a resumed training; call it from `on_train_start`. When a checkpoint was written after the last batch of an
    epoch, Lightning would treat the next epoch as already begun. `batches` of this epoch are completed, counted in the current batch
    size."""
    loop = trainer.fit_loop
    if not loop.restarted_mid_epoch:
        return
    progress, all_batches = loop.epoch_loop.batch_progress.current, trainer.num_training_batches
    epochs = loop.epoch_progress.current.state_dict()
    ended = epochs["processed"] == epochs["ready"]
    if not ended and batches >= all_batches:  # the remaining pictures do not fill a batch
        loop.epoch_progress.increment_processed()
        loop.epoch_progress.increment_completed()
        ended = True
    if ended:
        loop.reset_restart_stage()
    more = (int(all_batches) if ended else batches) - progress.ready
    progress.load_state_dict({name: count + more for name, count in progress.state_dict().items()})


def log_complete_steps(trainer: Trainer, complete: Callable[[], bool]) -> None:
    """Makes logged values reach the loggers once per optimizer step, not once per batch; call it from `on_train_start`."""
    connector = trainer._logger_connector
    update = connector.update_train_step_metrics
    connector.update_train_step_metrics = lambda: update() if complete() else None  # type: ignore[method-assign]


def log_by_step(trainer: Trainer) -> None:
    """Makes the loggers count optimizer steps from 0, where Lightning would count batches; call it within each batch."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1


def as_after_a_batch(checkpoint: dict[str, Any]) -> None:
    """Rewrites the progress in a checkpoint, in place, to its state in `on_train_batch_end`.

    From that state Lightning continues at the next batch, even if the epoch ends there or a validation was due (it has been done). From
    the progress after a validation, an epoch or the training, Lightning would miscount logged steps, batches or epochs by one, depending
    on the trainer's settings.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    if not batches["total"]["ready"]:
        return  # no batch has been trained yet
    for tracked in batches["total"], batches["current"]:
        tracked["completed"] = tracked["ready"] - 1
    for tracked in loop["epoch_progress"].values():
        tracked["processed"] = tracked["completed"] = tracked["ready"] - 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, without the "Epoch 3/-2" of a run whose length is given in steps, and drawn ten times a second at most."""

    drawn = -math.inf

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if now - self.drawn >= 0.1 or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            self.drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _get_train_description(self, current_epoch: int) -> str:
        limited = self.trainer.max_epochs not in (None, -1)
        return super()._get_train_description(current_epoch) if limited else f"Epoch {current_epoch}, {self.trainer.max_steps} steps in all"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the bar must be gone before the post-training hooks print
        self._stop_progress()

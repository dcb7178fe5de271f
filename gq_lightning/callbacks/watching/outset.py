"""Prints at the start of fit the folder, the numbers of pictures and steps, and, once known, the remaining time."""

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from gq_lightning.training.optimization import planned_steps

# steps not timed, since they warm up or compile; smallest number of timed steps; seconds that suffice
WARM_UP, STEPS, SECONDS = 3, 10, 10.0
VALIDATIONS = 10


class Outset(Callback):
    """Prints a line at the start of the training and another when its speed is known. It also ensures that there are validations: if the
    first would come after the end of the training, or if `at_most` batches are given as their largest distance, there are ten."""

    def __init__(self, at_most: int | None = None) -> None:
        self.at_most = at_most
        self._total, self._step, self._first, self._begin, self._said = math.inf, 0, 0, 0.0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accumulate: int = pl_module.accumulate  # type: ignore[assignment]
        self._total, self._step = planned_steps(trainer, accumulate), trainer.global_step
        self._first, self._begin, self._said = trainer.global_step + WARM_UP, 0.0, False
        self._validate_in_time(trainer, accumulate)
        training, evaluation = trainer.datamodule.pictures  # type: ignore[attr-defined]
        end = f"to {self._total:,} " if math.isfinite(self._total) else ""
        steps = f"steps {trainer.global_step:,} {end}" if trainer.global_step or not end else f"{self._total:,} steps "
        batch = trainer.datamodule.batch_size * accumulate * trainer.world_size  # type: ignore[attr-defined]
        rank_zero_info(
            f"{trainer.default_root_dir}: {steps}of {batch} pictures, training on {training:,} of them, validating on {evaluation:,}"
        )

    def _validate_in_time(self, trainer: Trainer, accumulate: int) -> None:
        every, epochs, epoch = trainer.val_check_batch, trainer.check_val_every_n_epoch, trainer.num_training_batches  # type: ignore[attr-defined]
        if not (trainer.enable_validation and every is not None and math.isfinite(self._total) and math.isfinite(epoch)):  # type: ignore[attr-defined]
            return
        batches = self._total * epoch / math.ceil(epoch / accumulate)
        tenth = max(1, int(batches / VALIDATIONS))
        if self.at_most is not None:
            trainer.val_check_batch = min(self.at_most, tenth)  # type: ignore[attr-defined]
        elif (first := every + (epochs - 1) * epoch if epochs else every) > batches:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = tenth, None  # type: ignore[attr-defined]
            rank_zero_info(
                f"validations are {tenth} batches apart: the first would come after {first}, but the training ends after "
                f"{batches:.0f} (--trainer.limit_val_batches 0 for none)"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        complete, self._step = trainer.global_step != self._step, trainer.global_step
        if self._said or not complete or self._step < self._first:
            return
        if not self._begin:
            self._begin, self._first = time.perf_counter(), trainer.global_step
            return
        seconds, steps = time.perf_counter() - self._begin, trainer.global_step - self._first
        if steps >= STEPS and (seconds >= SECONDS or steps >= 100 * STEPS):
            self._said = True
            left = f": about {spoken((self._total - trainer.global_step) * seconds / steps)} left" if math.isfinite(self._total) else ""
            rank_zero_info(f"{seconds / steps:.3g} seconds a step{left}, validations and the last evaluation not counted")


def spoken(seconds: float) -> str:
    """A duration in suitable units."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"

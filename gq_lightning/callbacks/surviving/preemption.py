"""Preemption: on SIGTERM a training writes checkpoints/last.ckpt and ends; on SLURM's warning signal the job is also requeued.

    signal -> finish the current step and a validation that is due -> last.ckpt -> [scontrol requeue] -> one line, exit status

Lightning's own handlers do not wait for the end of the step: one saves in the middle of it, the other communicates with other ranks.
Here a handler only records the signal. After each step the ranks exchange whether any has received one, and end at the same step.
"""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from gq_lightning.callbacks.surviving.last_checkpoint import last_checkpoint
from gq_lightning.lightning_internals import (
    SIGTERMException,
    cluster_environment,
    is_fitting,
    replace_signal_handlers,
    signal_launched_ranks,
    tell_to_stop,
    validation_is_due,
)


class Preemption(Callback):
    """Replaces Lightning's signal handlers. The exit status is 128 + the signal's number: 143 for SIGTERM, 138 for SIGUSR1.

    LastCheckpoint writes the checkpoint, never in the middle of an accumulation. Before the first step and after the last one there is
    nothing to write, and a signal ends the process immediately.

    With SLURM (which Lightning detects if srun is used), SIGUSR1, or `requeue_signal` of the SLURMEnvironment, requeues the job, unless
    the environment has `auto_requeue: false`.
    """

    def __init__(self) -> None:
        self._signal, self._step = 0, 0
        self._training = self._complete = False
        self._before: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            replace_signal_handlers(trainer, lambda: self._listen(trainer))

    def _listen(self, trainer: Trainer) -> None:
        self._signal, self._training = 0, False
        tell_to_stop(trainer, False)
        signals: list[int] = [signal.SIGTERM]
        if (requeue := _requeue_signal(trainer)) is not None:
            signals.append(requeue)
        self._before = {number: signal.signal(number, lambda number, frame: self._hear(trainer, number, frame)) for number in signals}

    def _hear(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        if not self._signal:
            signal_launched_ranks(trainer, number)
        self._signal = self._signal or number
        if not self._training:
            raise SIGTERMException

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training, self._step = True, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._complete, self._step = trainer.global_step != self._step, trainer.global_step
        if self._complete and not validation_is_due(trainer):
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer) and self._training and self._complete:
            self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        """If any rank was told to stop, LastCheckpoint saves next, and then Lightning's loop raises SIGTERMException."""
        tell_to_stop(trainer, trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False
        if self._signal:
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException):
            self.teardown(trainer, pl_module, "fit")
            return
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)  # a second signal would interrupt the shutdown
        number = self._signal or signal.SIGTERM
        exception.code = 128 + number
        if not trainer.is_global_zero:
            if isinstance(cluster_environment(trainer), LightningEnvironment):
                exception.code = 0  # otherwise Lightning's launcher would kill the first rank, which is still busy
            return
        path, name = last_checkpoint(trainer), signal.Signals(number).name
        saved = f"{path} is {'written' if trainer.received_sigterm else 'as it was'}" if path.exists() else "there is no checkpoint"
        requeued = _requeue() if number == _requeue_signal(trainer) else "the same command with --ckpt_path last resumes from there"
        print(f"stopped by {name} after step {trainer.global_step}: {saved}; {requeued}", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _requeue_signal(trainer: Trainer) -> int | None:
    environment = cluster_environment(trainer)
    return environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def _requeue() -> str:
    """Requeues the SLURM job and returns a message about it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
        problem = done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    return f"job {job} is requeued" if problem is None else f"job {job} could not be requeued ({problem}): submit it again"

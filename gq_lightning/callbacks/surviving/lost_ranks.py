"""A training that loses one of its ranks ends within seconds, on every machine, with a line that says which one and how to resume.

    a rank is killed -> its connections close -> collectives of the others fail -----------> one line, exit status 75
                     -> where no collective fails (NCCL may wait half an hour): its parent,
                        or its child under Lightning's launcher, sees that it is gone -----> the same

Under torchrun and srun the launcher is the parent, and ends the other ranks itself (srun with --kill-on-bad-exit).
"""

import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from gq_lightning.callbacks.surviving.last_checkpoint import last_checkpoint
from gq_lightning.lightning_internals import dismiss_observers, launched_ranks

STATUS = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
# gloo raises a plain RuntimeError with one of these; NCCL and the store raise their own exceptions
WORDS = re.compile(r"/gloo/|Gloo connect|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting")
LAUNCHER = "GQ_LIGHTNING_LAUNCHER"
GRACE = 5.0  # seconds that a process which has lost another gets to end by itself, with its own message


class LostRanks(Callback):
    """Ends this process, and those that it started, when another rank is gone. Nothing is saved: the remaining ranks may differ in state.

    It replaces Lightning's observer of the launched processes, which ends all within five seconds without saying how to resume.
    """

    def __init__(self) -> None:
        self._end, self._over = threading.Lock(), threading.Event()
        # whether Lightning's launcher, in another rank, started this process: it then inherits the variable that the launcher set
        self._launched = os.environ.get(LAUNCHER) == str(os.getppid())
        os.environ[LAUNCHER] = str(os.getpid())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        dismiss_observers()
        self._over.clear()
        threading.Thread(target=self._watch, args=(trainer, os.getppid()), daemon=True, name="lost-ranks").start()

    def _watch(self, trainer: Trainer, parent: int) -> None:
        while not self._over.wait(1.0):
            if _gone(trainer) or (self._launched and os.getppid() != parent):
                if not self._over.wait(GRACE):
                    self._leave(trainer, "the rank that began it is gone")
                return

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        lost = isinstance(exception, distributed.DistError) or (isinstance(exception, RuntimeError) and WORDS.search(str(exception)))
        if trainer.world_size == 1 or not lost:
            return
        if self._launched:
            time.sleep(GRACE)  # the rank that started this one knows more, and ends it
        until = time.monotonic() + 1.0
        while not _gone(trainer) and launched_ranks(trainer) and time.monotonic() < until:
            time.sleep(0.05)
        self._leave(trainer, _reason(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over.set()

    def _leave(self, trainer: Trainer, reason: str) -> None:
        """Ends without the usual cleanup, which may wait for ever for a rank that is gone."""
        if not self._end.acquire(blocking=False):
            return
        status = STATUS
        what = f"rank {trainer.global_rank} on {socket.gethostname()} has lost contact with another rank ({reason})"
        if gone := _gone(trainer):
            rank, code = next(iter(gone.items()))
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}, see above"
            what, status = f"rank {rank} on {socket.gethostname()} {how}", STATUS if code < 0 else code
        path = last_checkpoint(trainer)
        go_on = f"the same command with --ckpt_path last goes on from {path}" if path.exists() else "there is no checkpoint yet"
        print(f"error: {what}; {go_on}", file=sys.stderr, flush=True)
        for logger in trainer.loggers:
            logger.save()
        for process in [*multiprocessing.active_children(), *launched_ranks(trainer)]:
            process.kill()
        os._exit(status)


def _gone(trainer: Trainer) -> dict[int, int]:
    """Of the ranks that this process has begun those that did not end well: their exit status by rank."""
    first = trainer.global_rank + 1
    return {first + index: process.returncode for index, process in enumerate(launched_ranks(trainer)) if process.poll()}


def _reason(exception: BaseException) -> str:
    """The first line of a library's message, without the place in its source."""
    line = next(iter(str(exception).strip().splitlines()), type(exception).__name__)
    return re.sub(r"^\[\S+\] *", "", line).split(". This is typically")[0]

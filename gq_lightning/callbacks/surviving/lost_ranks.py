"""Ends a training that loses one of its ranks, with one line that says how to resume.

    a rank is killed -> its connections close -> collectives of the others fail -> one line, exit status 75

The launcher ends ranks that wait elsewhere: torchrun, srun (with --kill-on-bad-exit) and Lightning's own launcher do so.
"""

import multiprocessing
import os
import re
import signal
import socket
import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed

from gq_lightning.callbacks.surviving.last_checkpoint import last_checkpoint
from gq_lightning.lightning_internals import signal_launched_ranks

STATUS = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
# gloo raises a plain RuntimeError with one of these; NCCL and the store raise their own exceptions
WORDS = re.compile(r"/gloo/|Gloo connect|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting")


class LostRanks(Callback):
    """Ends this process and its children when another rank is gone. It saves nothing, because the ranks' states may differ."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        lost = isinstance(exception, distributed.DistError) or (isinstance(exception, RuntimeError) and WORDS.search(str(exception)))
        if trainer.world_size == 1 or not lost:
            return
        # the first line of the library's message, without its source location
        line = next(iter(str(exception).strip().splitlines()), type(exception).__name__)
        reason = re.sub(r"^\[\S+\] *", "", line).split(". This is typically")[0]
        path = last_checkpoint(trainer)
        go_on = f"the same command with --ckpt_path last resumes from {path}" if path.exists() else "there is no checkpoint yet"
        what = f"rank {trainer.global_rank} on {socket.gethostname()} has lost contact with another rank ({reason})"
        print(f"error: {what}; {go_on}", file=sys.stderr, flush=True)
        for logger in trainer.loggers:
            logger.save()
        for process in multiprocessing.active_children():
            process.kill()
        signal_launched_ranks(trainer, signal.SIGKILL)
        # skips the usual cleanup, which may wait forever for the lost rank
        os._exit(STATUS)

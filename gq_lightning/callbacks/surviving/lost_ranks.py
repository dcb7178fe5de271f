"""A training that loses one of its ranks ends with one line that says how to resume.

    a rank is killed -> its connections close -> collectives of the others fail -> one line, exit status 75

To end the ranks that wait elsewhere is their launcher's matter: torchrun, srun (with --kill-on-bad-exit) and Lightning's own do so.
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
    """Ends this process, and those that it started, when another rank is gone. It saves nothing: the other ranks may differ in state."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        lost = isinstance(exception, distributed.DistError) or (isinstance(exception, RuntimeError) and WORDS.search(str(exception)))
        if trainer.world_size == 1 or not lost:
            return
        # the first line of a library's message, without the place in its source
        line = next(iter(str(exception).strip().splitlines()), type(exception).__name__)
        reason = re.sub(r"^\[\S+\] *", "", line).split(". This is typically")[0]
        path = last_checkpoint(trainer)
        go_on = f"the same command with --ckpt_path last goes on from {path}" if path.exists() else "there is no checkpoint yet"
        what = f"rank {trainer.global_rank} on {socket.gethostname()} has lost contact with another rank ({reason})"
        print(f"error: {what}; {go_on}", file=sys.stderr, flush=True)
        for logger in trainer.loggers:
            logger.save()
        for process in multiprocessing.active_children():
            process.kill()
        signal_launched_ranks(trainer, signal.SIGKILL)
        # without the usual cleanup, which may wait for ever for a rank that is gone
        os._exit(STATUS)

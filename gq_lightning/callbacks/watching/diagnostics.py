"""Logs the spread of bits per token, images per second and memory during training, at the trainer's logging steps."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gq_lightning.callbacks.watching.dashboard import tensor_boards
from gq_lightning.training.module import is_logging_step, last_step


class Diagnostics(Callback):
    """Logs `bits/min|mean|max` and `images_per_second` over all ranks, a histogram of bits per token (rank 0), the peak `memory_gib` so
    far (rank 0), and the number of broken pictures skipped, if any."""

    def __init__(self) -> None:
        self._images, self._since = 0, 0.0
        self._paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._since, self._paused = 0, time.perf_counter(), None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # the time of a validation, and of the checkpoints after it, does not count
        if self._paused is not None:
            self._since, self._paused = self._since + time.perf_counter() - self._paused, None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch)
        if not is_logging_step(trainer, pl_module):
            return
        if (posterior := outputs["posterior"]) is not None:
            bits = posterior.bits
            for name, value, reduce in (("min", bits.amin(), "min"), ("mean", bits.mean(), "mean"), ("max", bits.amax(), "max")):
                pl_module.log(f"bits/{name}", value, reduce_fx=reduce, sync_dist=True, prog_bar=name == "mean")
            for logger in tensor_boards(trainer):
                logger.experiment.add_histogram("bits_per_token", bits.flatten().float().cpu(), last_step(trainer))
        now = time.perf_counter()
        rate = self._images * trainer.world_size / max(now - self._since, 1e-9)
        pl_module.log_dict({"images_per_second": rate, "memory_gib": peak_memory(pl_module.device) / 2**30})
        if skipped := trainer.datamodule.skipped:  # type: ignore[attr-defined]
            pl_module.log("skipped_pictures", float(skipped), prog_bar=True)
        self._images, self._since = 0, now


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of tensors on an accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        # resource's peak begins with that of the process which started this one, as rank 0 starts the others
        status = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return float("nan")
    import resource  # Unix only

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS

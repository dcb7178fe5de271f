"""What to watch while it trains: the spread of bits per token, and images per second. Only at the trainer's logging steps."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gq_lightning.tokenizer import is_written


class Diagnostics(Callback):
    """Logs `bits/min|mean|max` over all ranks, `images_per_second` over all ranks, a histogram of bits per token (of rank 0), and how
    many broken pictures were skipped, if any."""

    def __init__(self) -> None:
        self._images, self._since = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._since = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch)
        if not is_written(trainer):
            return
        bits = outputs["diagnostics"].get("bits")
        if bits is not None:
            for name, value, reduce in (("min", bits.amin(), "min"), ("mean", bits.mean(), "mean"), ("max", bits.amax(), "max")):
                pl_module.log(f"bits/{name}", value, reduce_fx=reduce, sync_dist=True, prog_bar=name == "mean")
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_histogram("bits_per_token", bits.flatten().float().cpu(), trainer.global_step)
        now = time.perf_counter()
        rate = self._images * trainer.world_size / max(now - self._since, 1e-9)
        pl_module.log("images_per_second", rate)
        if skipped := trainer.datamodule.skipped:  # type: ignore[attr-defined]
            pl_module.log("skipped_pictures", float(skipped), prog_bar=True)
        self._images, self._since = 0, now

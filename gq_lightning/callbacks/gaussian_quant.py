"""The Gaussian Quant post-training hook (https://arxiv.org/abs/2512.06609): when fit ends, the Gaussian VAE becomes a VQ-VAE.

fit ends -> freeze the encoder -> attach the random codebook -> write tokenizer/ -> measure both -> metrics.json, reconstructions.png
"""

import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from gq_lightning.data import ImageDataModule
from gq_lightning.evaluation import draw, evaluate, save_picture, some_images, write_metrics
from gq_lightning.quantizers.base import Quantizer
from gq_lightning.report import metrics_table
from gq_lightning.tokenizer import ImageTokenizer


class GaussianQuant(Callback):
    """Converts, exports and evaluates at the end of fit, into the run's folder.

    Args:
        quantizer: what to attach to the Gaussian VAE; null keeps the codebook of the quantizer it was trained with.
        rfid: measure rFID too, which costs more than all else on a CPU.
        columns: images in reconstructions.png.
    """

    def __init__(self, quantizer: Quantizer | None = None, rfid: bool = True, columns: int = 12) -> None:
        self.quantizer, self.rfid, self.columns = quantizer, rfid, columns
        self._begin = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ImageTokenizer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        training_seconds = round(time.perf_counter() - self._begin, 2)
        convert(pl_module, self.quantizer.to(pl_module.device) if self.quantizer is not None else None)
        run = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            pl_module.save_pretrained(run / "tokenizer")
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        values, protocol = evaluate(pl_module, data.test_dataloader(), self.rfid, progress=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics({f"final/{name}": float(value) for name, value in values.items()}, step=trainer.global_step)
            logger.save()
        write_metrics(
            run / "metrics.json",
            values,
            protocol,
            data.protocol(),
            seconds=round(time.perf_counter() - self._begin, 2),
            training_seconds=training_seconds,
            steps=trainer.global_step,
            tokenizer_fingerprint=pl_module.fingerprint,
        )
        with torch.no_grad():
            images = some_images(data.evaluation_set(), self.columns).to(pl_module.device)
            save_picture(draw(images, pl_module.eval().reconstruct(images)), run / "reconstructions.png")
        console = Console()
        console.print(
            metrics_table(values, title=f"{pl_module.quantizer.bits_per_position:g} bits per position, {values['images']} images")
        )
        for name in ("metrics.json", "reconstructions.png", "tokenizer"):
            console.print(f"  {run / name}", soft_wrap=True)


def convert(tokenizer: ImageTokenizer, quantizer: Quantizer | None = None) -> None:
    """Freezes the encoder and attaches the codebook: from here on tokens are what the tokenizer gives. No training involved."""
    tokenizer.freeze_encoder()
    if quantizer is not None:
        tokenizer.attach(quantizer)
    tokenizer.eval()

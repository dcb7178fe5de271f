"""Writes the tokenizer when fit ends, measures it and draws reconstructions, for all methods.

fit ends -> (a post-training hook converts) -> tokenizer/ -> evaluation of the tokens -> metrics.json, reconstructions.png, a table
"""

import time
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from gq_lightning.data import ImageDataModule
from gq_lightning.data.pictures.reading import save_picture
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import draw, evaluate, some_images, write_metrics
from gq_lightning.evaluation.report import compared, metrics_table
from gq_lightning.files import RunFolder
from gq_lightning.training.module import TokenizerTraining, last_step


class Export(Callback):
    """Exports and evaluates into the run's folder at the end of fit, after the hooks that convert.

    Args:
        rfid: measure rFID too, which costs more than everything else on a CPU.
        columns: images in reconstructions.png.
        gaussian_rfid: also measure the rFID of images decoded from the posterior mean; as expensive as that of the tokens.
        weights: the weights after the `last` step, or the `best` by validation, from checkpoints/best.ckpt.
    """

    def __init__(self, rfid: bool = True, columns: int = 12, gaussian_rfid: bool = True, weights: Literal["last", "best"] = "last") -> None:
        self.rfid, self.columns, self.gaussian_rfid, self.weights = rfid, columns, gaussian_rfid, weights
        if columns < 1:
            raise UserError(f"export.columns {columns}: give a positive number")
        self._step = 0
        self._begin = self._trained = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()
        if self.weights == "best" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            callback = trainer.checkpoint_callback
            if not (trainer.limit_val_batches and isinstance(callback, ModelCheckpoint) and callback.monitor and callback.save_top_k):
                raise UserError("export.weights: best needs validations, checkpoint.monitor, and checkpoint.save_top_k of at least 1")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained, self._step = time.perf_counter(), trainer.global_step
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        if self.weights == "best" and best:
            # averaged weights are in place by now, and nothing is converted yet
            checkpoint = trainer.strategy.load_checkpoint(best, weights_only=True)
            pl_module.load_state_dict(checkpoint["state_dict"])
            self._step = checkpoint["global_step"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.eval()
        run = RunFolder(trainer.default_root_dir)
        if trainer.is_global_zero:
            pl_module.tokenizer.save_pretrained(run.tokenizer)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        values, protocol = evaluate(pl_module.tokenizer, data.test_dataloader(), self.rfid, trainer.is_global_zero, self.gaussian_rfid)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            # only the numbers by which runs compare; metrics.json has the others
            final = {f"final/{name}": float(values[name]) for name in compared() if name in values}
            logger.log_metrics(final, step=last_step(trainer))
            logger.save()
        write_metrics(
            run.metrics,
            values,
            protocol,
            data.protocol(),
            seconds=round(time.perf_counter() - self._begin, 2),
            training_seconds=round(self._trained - self._begin, 2),
            steps=trainer.global_step,
            weights={"of": self.weights, "step": self._step},
            tokenizer_fingerprint=pl_module.tokenizer.fingerprint,
        )
        with torch.no_grad():
            images = some_images(data.evaluation_set(), self.columns).to(pl_module.device)
            save_picture(draw(images, pl_module.tokenizer.reconstruct(images)), run.reconstructions)
        console = Console(markup=False, emoji=False)
        console.print(
            metrics_table(values, title=f"{pl_module.tokenizer.quantizer.bits_per_position:g} bits per position, {values['images']} images")
        )
        for path in (run.metrics, run.reconstructions, run.tokenizer):
            console.print(f"  {path}", soft_wrap=True)

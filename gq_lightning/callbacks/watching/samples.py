"""Logs a grid of a prior's samples at every validation, always from the same random numbers."""

from lightning.pytorch import Callback, LightningModule, Trainer

from gq_lightning.callbacks.watching.reconstructions import log_picture, takes_pictures
from gq_lightning.errors import UserError
from gq_lightning.priors.generation import sheet
from gq_lightning.priors.sampling import Sampling
from gq_lightning.priors.training import PriorTraining
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.training.module import last_step


class Samples(Callback):
    """Logs the grid to every logger that supports images.

    Args:
        count: number of pictures, cycling through the classes; 0 draws none.
        cfg: classifier-free guidance.
    """

    def __init__(self, count: int = 16, cfg: float = 1.0) -> None:
        if count < 0:
            raise UserError(f"samples.count {count}: give a number of pictures, or 0")
        self.count, self.sampling = count, Sampling(cfg)
        self._tokenizer: ImageTokenizer | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watched = trainer.is_global_zero and any(map(takes_pictures, trainer.loggers))
        if not (watched and self.count) or trainer.sanity_checking:
            return
        assert isinstance(pl_module, PriorTraining)
        if self._tokenizer is None:
            self._tokenizer = ImageTokenizer.from_pretrained(trainer.datamodule.tokenizer).to(pl_module.device)  # type: ignore[attr-defined]
        picture = sheet(pl_module.prior, self._tokenizer, self.count, sampling=self.sampling, batch_size=self.count)
        for logger in trainer.loggers:
            log_picture(logger, "samples", picture, last_step(trainer))

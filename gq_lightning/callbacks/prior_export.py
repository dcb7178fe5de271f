"""Writes the prior with its tokenizer, its metrics and a sheet of samples when `prior fit` ends.

fit ends -> prior/, prior/tokenizer/ -> metrics.json, samples.png, a line
"""

import time

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from gq_lightning.data.pictures.reading import save_picture
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import write_metrics
from gq_lightning.files import RunFolder
from gq_lightning.priors.generation import sheet
from gq_lightning.priors.training import PriorTraining
from gq_lightning.tokenizer import ImageTokenizer

PROTOCOL = {"bits_per_pixel": "minus log2 p of all tokens of a held-out picture, over its pixels; averaged over the pictures"}


class PriorExport(Callback):
    """Exports into the run's folder at the end of fit.

    Args:
        samples: number of pictures in samples.png, cycling through the classes.
    """

    def __init__(self, samples: int = 32) -> None:
        if samples < 0:
            raise UserError(f"export.samples {samples}: give a number of pictures, or 0")
        self.samples = samples
        self._begin = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PriorTraining)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.eval()
        seconds = round(time.perf_counter() - self._begin, 2)
        run, data, prior = RunFolder(trainer.default_root_dir), trainer.datamodule, pl_module.prior  # type: ignore[attr-defined]
        values = pl_module.measure(data.val_dataloader())
        if not trainer.is_global_zero:
            return
        tokenizer = ImageTokenizer.from_pretrained(data.tokenizer)
        prior.save_pretrained(run.prior)
        tokenizer.save_pretrained(run.prior / "tokenizer")
        facts = {"seconds": seconds, "steps": trainer.global_step, "prior_fingerprint": prior.fingerprint}
        write_metrics(run.metrics, values, PROTOCOL, data.protocol(), **facts)
        if self.samples:
            save_picture(sheet(prior, tokenizer.to(pl_module.device), self.samples), run.samples)
        parts = (values[name] for name in ("bits_per_pixel", "bits_per_pixel_counts", "bits_per_pixel_uniform"))
        console = Console(markup=False, emoji=False)
        console.print("bits per pixel of held-out pictures: {:.4f}; by counts of tokens {:.4f}; all tokens alike {:.4f}".format(*parts))
        for path in (run.metrics, run.samples, run.prior):
            console.print(f"  {path}", soft_wrap=True)

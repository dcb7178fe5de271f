"""RUN/broken_pictures.txt: the broken pictures that a training skipped."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gq_lightning.data import ImageDataModule
from gq_lightning.errors import printable
from gq_lightning.files import RunFolder, write_whole
from gq_lightning.lightning_internals import is_fitting


class BrokenPictures(Callback):
    """Writes the names of the broken pictures of all workers and ranks after each validation and at the end of fit.

    Each picture is named once, although several ranks may find it. A resumed training adds to the report. If an error ends the training,
    the report contains only what the first rank knows, because the others may be waiting.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer) and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if is_fitting(trainer):
            self._write(trainer, pl_module, alone=True)

    def _write(self, trainer: Trainer, pl_module: LightningModule, alone: bool = False) -> None:
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        found = set()
        for guarded in data.loaded:
            flags = guarded.broken if alone else torch.as_tensor(pl_module.all_gather(guarded.broken.to(pl_module.device)))
            broken = flags.view(-1, len(guarded)).amax(0).nonzero().flatten().tolist()
            found |= {printable(f"{guarded.pictures.split}: {guarded.pictures.name(index)}") for index in broken}
        if not (found and trainer.is_global_zero):
            return
        path = RunFolder(trainer.default_root_dir).broken_pictures
        known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        if found <= known:
            return
        write_whole(path, "".join(f"{line}\n" for line in sorted(found | known)).encode())

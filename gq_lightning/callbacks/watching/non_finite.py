"""Stops a training when the loss or its gradient is not finite, and writes the batch to RUN/non_finite/."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save
from torch import Tensor
from torchvision.utils import make_grid

from gq_lightning.data import to_picture
from gq_lightning.data.pictures.reading import save_picture
from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder, write_whole


@dataclass(frozen=True)
class Batch:
    """A batch of a step, with its loss and whether it is finite, which the device may not have computed yet."""

    images: Tensor
    epoch: int
    index: int
    loss: Tensor
    finite: Tensor


class NonFinite(Callback):
    """Stops a training whose loss or gradient is NaN or infinite, and names and writes the batch. No such state is saved in a checkpoint.

    The host checks a step while the next one is running, so that it does not wait for the device, except before a validation and before
    a checkpoint is written. Gradients are averaged over ranks, so one rank's bad batch stops all of them at the same step.
    """

    def __init__(self) -> None:
        self._step = 0
        self._current: list[Batch] = []
        self._before: list[Batch] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._current, self._before = trainer.global_step, [], []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"]
        finite = torch.isfinite(torch.stack([loss.float(), *outputs["gradient_norms"]])).all()
        self._current.append(Batch(batch, trainer.current_epoch, batch_idx, loss, finite))
        if trainer.global_step == self._step:
            return  # the step is incomplete, and the other ranks would not stop here
        self._check(trainer, self._before)
        self._step, self._before, self._current = trainer.global_step, self._current, []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # otherwise the search for tokens would fail with a less helpful message
        self._check(trainer, self._before)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, self._before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, self._before)
        self._before = []

    def _check(self, trainer: Trainer, batches: list[Batch]) -> None:
        if not batches or torch.stack([batch.finite for batch in batches]).all():
            return
        # a non-finite loss identifies this rank's batch; a gradient may come from any batch of any rank
        guilty = [batch for batch in batches if not torch.isfinite(batch.loss)]
        culprit = (guilty or batches)[0]
        what = f"the loss is {float(culprit.loss)}" if guilty else "the gradient is not finite, the loss of this rank is"
        path, names = self._write(trainer, culprit)
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(
            f"{what} at batch {culprit.index} of epoch {culprit.epoch} on rank {trainer.global_rank} ({some}), which is kept in {path}: "
            "lower model.learning_rate or set model.gradient_clip, and resume from the last checkpoint with --ckpt_path last"
        )

    def _write(self, trainer: Trainer, batch: Batch) -> tuple[Path, list[str]]:
        names = trainer.datamodule.batch_names(batch.epoch, batch.index)  # type: ignore[attr-defined]
        name = f"epoch{batch.epoch}-batch{batch.index}-rank{trainer.global_rank}.safetensors"
        path = RunFolder(trainer.default_root_dir).non_finite / name
        images = batch.images.detach().float().cpu()
        told = {"epoch": batch.epoch, "batch": batch.index, "loss": str(float(batch.loss)), "names": names}
        write_whole(path, save({"images": images.contiguous()}, {"told": json.dumps(told)}))
        save_picture(to_picture(make_grid(images.nan_to_num(), nrow=8, pad_value=1)), path.with_suffix(".png"))
        return path, names

"""RUN/non_finite/: the batch after which the loss or its gradient was no longer finite; the training stops there."""

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
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import save_picture
from gq_lightning.files import RunFolder, write_whole


@dataclass(frozen=True)
class Batch:
    """One that a step was made of, and what the device has, perhaps not yet, found out about it."""

    images: Tensor
    epoch: int
    index: int
    loss: Tensor
    finite: Tensor


class NonFinite(Callback):
    """Stops a training that has turned into NaN or infinity, names the batch and writes it out; no checkpoint of it is kept.

    The host looks at a step when the next one is on its way, so that it never waits for the device; before a validation and before a
    checkpoint is written it does. Gradients are averages over ranks: what one rank's batch has spoiled stops all of them at the same step.
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
            return  # the step is not complete: the other ranks would not stop here
        self._check(trainer, self._before)
        self._step, self._before, self._current = trainer.global_step, self._current, []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # spoiled weights have no tokens, and the search for them would be the one to complain
        self._check(trainer, self._before)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, self._before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, self._before)
        self._before = []

    def _check(self, trainer: Trainer, batches: list[Batch]) -> None:
        if not batches or torch.stack([batch.finite for batch in batches]).all():
            return
        # the loss accuses this rank's batch; a gradient alone may be that of any batch of any rank
        guilty = [batch for batch in batches if not torch.isfinite(batch.loss)]
        culprit = (guilty or batches)[0]
        what = f"the loss is {float(culprit.loss)}" if guilty else "the gradient is not finite, the loss of this rank is"
        path, names = self._write(trainer, culprit)
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(
            f"{what} at batch {culprit.index} of epoch {culprit.epoch} on rank {trainer.global_rank} ({some}), which is kept in {path}: "
            "lower model.learning_rate or set model.gradient_clip, and go on from the last checkpoint with --ckpt_path last"
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

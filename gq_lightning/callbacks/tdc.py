"""TDC callback: updates the multipliers after each step from the statistics of the global batch (https://arxiv.org/abs/2512.06609).

The command line adds it for every Gaussian quantizer. Without it, or with `tdc_variant: fixed`, the multipliers stay at 1.
"""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gq_lightning.callbacks.watching.dashboard import log_for_charts
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PosteriorQuantizer
from gq_lightning.quantizers.tdc import TargetDivergence
from gq_lightning.training.module import TokenizerTraining, is_logging_step, last_step


class TDC(Callback):
    """Reduces min, mean and max of the bits per token over accumulated batches and over ranks, and calls `update`.

    It does nothing for a quantizer with exact divergence, which has no multipliers, or a plain Gaussian VAE, whose multipliers are fixed,
    or where only the decoder is trained.

    Everything stays on the device, and the host never waits for a value. One collective of four numbers per step, reduced in the same
    order on all ranks, keeps their multipliers equal to the bit.
    """

    def __init__(self) -> None:
        self._tdc: TargetDivergence | None = None
        self._pending: list[Tensor] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TokenizerTraining)
        quantizer = pl_module.tokenizer.quantizer
        if not isinstance(quantizer, PosteriorQuantizer):
            raise UserError(f"trainer.callbacks: TDC needs a Gaussian quantizer, not {type(quantizer).__name__}: remove one of them")
        still = pl_module.decoder_alone or quantizer.tdc is None or quantizer.tdc.variant == "fixed"
        self._tdc = None if still else quantizer.tdc
        self._pending, self._step = [], trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._tdc is None:
            return
        bits = outputs["posterior"].bits
        total = bits.sum()
        self._pending.append(torch.stack([*bits.aminmax(), total, torch.full_like(total, bits.numel())]))
        if trainer.global_step == self._step:
            return  # gradients are still accumulating
        self._step = trainer.global_step
        local, self._pending = _merged(self._pending), []
        minimum, maximum, total, count = _merged(torch.as_tensor(pl_module.all_gather(local)).view(-1, 4).unbind())
        tdc = self._tdc
        tdc.update(minimum, total / count, maximum)
        if is_logging_step(trainer, pl_module):
            pl_module.log_dict({f"tdc/{name}": multiplier for name, multiplier in tdc.named_buffers()})
            # TensorBoard's charts have no logarithmic axis
            band = {"target_low": tdc.target_bits - tdc.alpha, "target_high": tdc.target_bits + tdc.alpha}
            logarithms = {f"log10_{name}": math.log10(float(multiplier)) for name, multiplier in tdc.named_buffers()}
            log_for_charts(trainer, band | logarithms, last_step(trainer))


def _merged(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Minimum, maximum, sum and number of the tokens of all parts, each four such numbers."""
    if len(parts) == 1:
        return parts[0]
    every = torch.stack(parts)
    return torch.stack([every[:, 0].amin(), every[:, 1].amax(), every[:, 2].sum(), every[:, 3].sum()])

"""Warns once about each problem of a training with the target divergence constraint, and says what to change."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PosteriorQuantizer
from gq_lightning.quantizers.tdc import HIGHEST, LOWEST, TargetDivergence
from gq_lightning.training.module import TokenizerTraining, is_logging_step

OPTION = "model.quantizer.init_args"
# share of a batch's tokens outside the band that is still acceptable
SHARE = 0.05
# share of the average cost of a dimension below which a dimension is unused
DEAD = 0.01


class Advice(Callback):
    """Checks rank 0's batches at the trainer's logging steps, and warns if one of these lasts for `patience` steps:

    - the average bits per token are off target,
    - a multiplier is at its bound, and a twentieth of the tokens are still on the wrong side,
    - latent dimensions cost almost nothing, so the encoder does not use them.

    Validation warns about a collapsed codebook, and `NonFinite` stops a training whose loss is not finite.

    Args:
        patience: steps. At the default factor of 1.01 a multiplier crosses its whole range in 1 389 steps.
    """

    def __init__(self, patience: int = 3000) -> None:
        if patience < 1:
            raise UserError(f"advice.patience {patience}: give a positive number of steps")
        self.patience = patience
        self._said: set[str] = set()
        self._since: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._said, self._since = set(), {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (trainer.is_global_zero and is_logging_step(trainer, pl_module)):
            return
        assert isinstance(pl_module, TokenizerTraining)
        quantizer, posterior, step = pl_module.tokenizer.quantizer, outputs["posterior"], trainer.global_step
        if not isinstance(quantizer, PosteriorQuantizer) or posterior is None:
            return
        if quantizer.tdc is not None and quantizer.tdc.variant != "fixed":
            self._target(step, quantizer.tdc, posterior.bits)
        self._dimensions(step, posterior.dimension_bits)

    def _target(self, step: int, tdc: TargetDivergence, bits: Tensor) -> None:
        mean, below, above = torch.stack(
            [bits.mean(), (bits < tdc.target_bits - tdc.alpha).float().mean(), (bits > tdc.target_bits + tdc.alpha).float().mean()]
        ).tolist()
        goal = f"{tdc.target_bits:g} ± {tdc.alpha:g}"
        cure = "lower" if mean < tdc.target_bits else "raise"
        problems = [
            (
                "target",
                abs(mean - tdc.target_bits) > tdc.alpha,
                f"tokens cost {mean:.1f} bits on average, but the target is {goal}: train longer, raise {OPTION}.tdc_beta ({tdc.beta:g}), "
                f"which moves the multipliers faster, or {cure} {OPTION}.penalty_weight",
            )
        ]
        for name, share, side, change in (
            ("lambda_min", below, "below", f"train longer, give more {OPTION}.latent_channels, or lower the rate"),
            ("lambda_max", above, "above", f"raise {OPTION}.penalty_weight, or the rate"),
            ("lambda_mean", below + above, "beside", f"change {OPTION}.penalty_weight by a factor of ten"),
        ):
            value = float(getattr(tdc, name))
            at_its_bound = value <= LOWEST * 1.001 or value >= HIGHEST * 0.999
            text = f"{name} is at its bound, {value:g}, and {share:.0%} of the tokens are still {side} {goal} bits: {change}"
            problems.append((name, share > SHARE and at_its_bound, text))
        for name, wrong, text in problems:
            if self._lasts(name, step, wrong):
                self._say(name, f"for {self.patience} steps {text}")

    def _dimensions(self, step: int, dimension_bits: Tensor) -> None:
        values = dimension_bits.tolist()
        least = DEAD * sum(values) / len(values)
        dead = [str(index) for index, value in enumerate(values) if self._lasts(f"dimension {index}", step, value < least)]
        if dead:
            self._say(
                "dimensions",
                f"{len(dead)} of {len(values)} latent dimensions ({', '.join(dead)}) have carried almost no bits for "
                f"{self.patience} steps: give fewer {OPTION}.latent_channels, lower {OPTION}.penalty_weight, or change model.learning_rate",
            )

    def _lasts(self, name: str, step: int, wrong: bool) -> bool:
        """Whether something is wrong and has been for `patience` steps."""
        if not wrong:
            self._since.pop(name, None)
            return False
        return step - self._since.setdefault(name, step) >= self.patience

    def _say(self, name: str, text: str) -> None:
        if name not in self._said:
            self._said.add(name)
            rank_zero_warn(text)

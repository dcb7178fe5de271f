"""AdamW with warm-up and an optional cosine decay, counted in optimizer steps."""

import math
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from gq_lightning.errors import UserError

Schedule = Literal["constant", "cosine"]


def adamw(
    module: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_steps: int,
    schedule: Schedule,
    steps: float,
) -> OptimizerLRSchedulerConfig:
    """Optimizer and schedule of a module's trainable parameters, as Lightning wants them.

    Args:
        weight_decay: of matrices and kernels; biases, norms and scalars are not decayed.
        warmup_steps: steps over which the learning rate rises linearly.
        schedule: `constant`, or `cosine` down to 1 % at step `steps`.
        steps: length of the training; finite for `cosine`.

    Raises:
        UserError: a cosine without an end.
    """
    if schedule == "cosine" and not math.isfinite(steps):
        raise UserError("model.schedule: cosine needs an end: set trainer.max_steps or trainer.max_epochs")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * (1.0 if schedule == "constant" else 0.505 + 0.495 * math.cos(math.pi * min(1.0, step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

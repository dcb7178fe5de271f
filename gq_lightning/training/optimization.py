"""AdamW with warm-up and an optional cosine decay, counted in optimizer steps."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gq_lightning.errors import UserError
from gq_lightning.lightning_internals import leave_uncounted

Schedule = Literal["constant", "cosine"]
# devices on which torch has AdamW as one kernel, instead of several passes over the weights
FUSED = ("cpu", "cuda")


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_steps: int,
    schedule: Schedule,
    steps: float,
) -> OptimizerLRSchedulerConfig:
    """Optimizer and schedule of those parameters that are trainable, as Lightning wants them.

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
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in FUSED for parameter in trainable) or None
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * (1.0 if schedule == "constant" else 0.505 + 0.495 * math.cos(math.pi * min(1.0, step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def take_step(optimizer: LightningOptimizer, scheduler: LRScheduler, gradient_clip: float | None, counted: bool) -> Tensor:
    """Clips, steps and forgets the gradients; returns their norm before clipping, a scalar on the device.

    Args:
        scheduler: of this optimizer's learning rate, stepped with it.
        gradient_clip: largest norm of the gradients of all the optimizer's parameters; None does not clip.
        counted: whether this is a step of the training. Lightning counts each optimizer's; with two of them per batch,
            `max_steps`, checkpoints and schedules would run at double speed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if gradient_clip is None:
        norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    else:
        norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    if not counted:
        leave_uncounted(optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    return norm

"""AdamW with warm-up and an optional cosine decay, the number of steps of a training, and resuming with changed settings."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gq_lightning.errors import UserError
from gq_lightning.lightning_internals import is_fitting, leave_uncounted

Schedule = Literal["constant", "cosine"]
# devices on which torch has a fused AdamW kernel
FUSED = ("cpu", "cuda")


def planned_steps(trainer: Trainer, accumulate: int) -> float:
    """Optimizer steps of the whole training, as Lightning counts them; infinite without a limit.

    `accumulate` batches make a step, as do the remaining batches at the end of an epoch. The training ends at `max_steps` or `max_epochs`,
    whichever comes first.
    """
    steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs in (None, -1):
        return steps
    # estimated_stepping_batches comes first, because it loads the data for num_training_batches
    if math.isfinite(trainer.estimated_stepping_batches) and math.isfinite(batches := trainer.num_training_batches):
        return min(steps, math.ceil(batches / accumulate) * trainer.max_epochs)
    return steps


def check_adamw(where: str, learning_rate: float, betas: tuple[float, float], weight_decay: float = 0, warmup_steps: int = 0) -> None:
    """Raises UserError for settings that `adamw` cannot use. Constructors call it, so that a run is refused before it replaces another."""
    if not (0 <= learning_rate < math.inf and weight_decay >= 0 and warmup_steps >= 0 and all(0 <= beta < 1 for beta in betas)):
        wrong = f"{where}.learning_rate {learning_rate}, weight_decay {weight_decay}, warmup_steps {warmup_steps}, betas {betas}"
        raise UserError(f"{wrong}: none may be negative, nor the learning rate infinite, nor a beta 1 or more")


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    warmup_steps: int,
    schedule: Schedule,
    steps: float,
) -> OptimizerLRSchedulerConfig:
    """Optimizer and schedule of the trainable parameters, in Lightning's form. Raises UserError if the schedule is `cosine` and `steps` is
    infinite.

    Args:
        weight_decay: of matrices and kernels; biases, norms and scalars are not decayed.
        warmup_steps: steps over which the learning rate rises linearly.
        schedule: `constant`, or `cosine` down to 1 % at step `steps`, the length of the training.
    """
    if schedule == "cosine" and not math.isfinite(steps):
        raise UserError("model.schedule: cosine needs a finite training: set trainer.max_steps or trainer.max_epochs")
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in FUSED for parameter in trainable) or None
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_moments_alone)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * (1.0 if schedule == "constant" else 0.505 + 0.495 * math.cos(math.pi * min(1.0, step / max(steps, 1))))

    scheduler = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def weights_to_go_on_with(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Chooses the weights from which fit resumes: the trained ones, if weights are no longer averaged. Call it when loading a checkpoint.
    Raises UserError if the checkpoint has no optimizer state, or weights that are not finite."""
    for states in ("state_dict", "current_model_state"):
        for name, tensor in checkpoint.get(states, {}).items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"--ckpt_path: {name} has values that are not finite: the training diverged; give an earlier checkpoint")
    if not is_fitting(trainer):
        return
    if not checkpoint.get("optimizer_states"):
        raise UserError("--ckpt_path: the checkpoint has weights only and cannot be resumed: give one with the optimizer's state")
    if not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        checkpoint["state_dict"] = checkpoint.pop("current_model_state", checkpoint["state_dict"])


def _moments_alone(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """What an AdamW takes from the state in a checkpoint: steps and moments. Its settings stay those of `adamw`. Raises UserError if the
    state belongs to other parameters, lacks a moment, or has a value that no training leaves there."""
    own = optimizer.state_dict()["param_groups"]
    groups, states = loaded.get("param_groups"), loaded.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict) or not all(isinstance(group, dict) for group in groups):
        raise UserError("--ckpt_path: optimizer_states: lacks param_groups or state: give another checkpoint")
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        raise UserError("--ckpt_path: optimizer_states: belongs to other parameters than those to be trained: give the configs of its run")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {}
    for number, state in states.items():
        where = f"--ckpt_path: optimizer_states: the state of parameter {number!r:.20}"
        if number not in range(len(parameters)) or not isinstance(state, dict):
            raise UserError(f"{where} belongs to no parameter: give another checkpoint")
        shapes = {"step": torch.Size(), "exp_avg": parameters[number].shape, "exp_avg_sq": parameters[number].shape}
        for name, shape in shapes.items():
            tensor = state.get(name)
            if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
                raise UserError(f"{where} has no {name} of shape {tuple(shape)}: give another checkpoint")
            if not bool(tensor.isfinite().all()) or (name != "exp_avg" and bool((tensor < 0).any())):
                raise UserError(f"{where}: {name} has values that are negative or not finite: the training diverged; give an earlier one")
        kept[number] = {name: _laid_like(parameters[number], state[name]) for name in shapes}
    return {"state": kept, "param_groups": own}


def _laid_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """The moment with its values in the parameter's order of memory, which fused kernels take for granted: a checkpoint may come from a
    training in another layout."""
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment) if moment.ndim else moment


def as_asked_for(optimizer: LightningOptimizer, scheduler: LambdaLR) -> None:
    """Gives an optimizer that was loaded from a checkpoint the learning rates from `adamw` at the step that it has reached, whatever
    learning rates and steps the checkpoint's schedule has."""
    asked = optimizer.defaults["lr"]
    scheduler.last_epoch = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    scheduler.base_lrs = [asked for _ in scheduler.base_lrs]
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group |= {"lr": asked * factor(scheduler.last_epoch), "initial_lr": asked}


def take_step(optimizer: LightningOptimizer, scheduler: LRScheduler, gradient_clip: float | None, counted: bool) -> Tensor:
    """Clips the gradients, makes a step of optimizer and learning rate, and clears them. Returns their norm before clipping, on the device.

    Unless it is `counted` as a training step, Lightning does not count it: it counts the steps of every optimizer, so with two of them
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

"""Which of the options that Lightning brings along are served here, and what to do instead of the others.

An option does what its help says, or is refused by its name before anything begins.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder

# what an option may be all the same, and what to do instead
Replaced = tuple[tuple[Any, ...], str]
_BOTH = "which serves generator and discriminator alike"
_RUN = "checkpoints lie in the run's folder"
# options of Lightning that something of this package takes the place of
REPLACED: dict[str, Replaced] = {
    "trainer.precision": ((None, 32, "32", "32-true", "bf16", "bf16-mixed"), "train in 32-true or bf16-mixed"),
    "trainer.overfit_batches": ((0, 0.0), "set trainer.limit_train_batches, which takes the pictures in their order"),
    "trainer.reload_dataloaders_every_n_epochs": ((0,), "the order of pictures follows from the epoch: leave it out"),
    "trainer.enable_checkpointing": ((None, True), "last.ckpt is always kept: set checkpoint.save_top_k 0 for no other"),
    "trainer.barebones": ((False,), "a fit needs its callbacks: set trainer.logger false and trainer.limit_val_batches 0 for speed"),
    "trainer.model_registry": ((None,), f"{_RUN}: leave it out"),
    "checkpoint.dirpath": ((None,), f"{_RUN}: set --runs, or make RUNS/NAME/checkpoints a link"),
    "checkpoint.save_last": ((None, False), "last.ckpt is always written, see last.every_n_train_steps: leave it out"),
    "checkpoint.save_on_exception": ((False,), "it would take the place of the best: go on from last.ckpt, see last.every_n_train_steps"),
    "optimizer": ((None,), "it is AdamW: set model.learning_rate, model.betas and model.weight_decay"),
    "lr_scheduler": ((None,), "set model.schedule and model.warmup_steps"),
}
# and where a tokenizer is trained, which has two optimizers
OF_TOKENIZERS: dict[str, Replaced] = {
    "trainer.accumulate_grad_batches": ((None, 1), f"use model.accumulate, {_BOTH}"),
    "trainer.gradient_clip_val": ((None,), f"use model.gradient_clip, {_BOTH}"),
    "trainer.gradient_clip_algorithm": ((None, "norm"), f"use model.gradient_clip, a norm, {_BOTH}"),
    "checkpoint.train_time_interval": (
        (None,),
        "Lightning does not heed it where a training has two optimizers: use last.every_n_train_steps",
    ),
}
LEAST = {
    "threads": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 0,
}


def check_options(option: Callable[[str], Any], replaced: Mapping[str, Replaced]) -> None:
    """Raises UserError where an option, which `option` gives by name, would be ignored, spoil something, or fail later.

    Args:
        replaced: those that this kind of training has something else for, beside REPLACED.
    """
    for name, (harmless, cure) in (REPLACED | dict(replaced)).items():
        if (value := option(name)) not in harmless:
            raise UserError(f"{name}: {value if isinstance(value, bool | int | float | str) else 'given'}: {cure}")
    for name, least in LEAST.items():
        if isinstance(value := option(name), int) and value < least:
            raise UserError(f"{name}: {value}: give {least} or more")
    checkpoint, logged = option("checkpoint"), option("trainer.log_every_n_steps")
    name, monitor, steps = checkpoint.filename or "{step}", checkpoint.monitor, checkpoint.every_n_train_steps
    distinct = "{" in name or checkpoint.enable_version_counter or checkpoint.save_top_k in (0, 1)
    if not distinct and name != RunFolder("").best.stem:
        raise UserError(f"checkpoint.filename: {name} has one name for all of save_top_k {checkpoint.save_top_k}: put {{step}} into it")
    if name.startswith(RunFolder("").last.stem):
        raise UserError(f"checkpoint.filename: {name} is what --ckpt_path last resumes from: choose another")
    # a file must not be kept for what was measured at another step
    stale = f"{monitor} is not measured then: leave it out, or set checkpoint.monitor null"
    if monitor is not None and steps and (monitor.startswith("val/") or logged == 0 or steps % (logged or 50)):
        raise UserError(f"checkpoint.every_n_train_steps: {stale}")
    for name in ("save_on_train_epoch_end", "train_time_interval"):
        if monitor is not None and checkpoint[name]:
            raise UserError(f"checkpoint.{name}: {stale}")
    if checkpoint.save_weights_only and option("ema_decay") is not None:
        raise UserError("checkpoint.save_weights_only: such a file lacks the averages of ema_decay: leave out one of them")

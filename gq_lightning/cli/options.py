"""Options that this package refuses, each with the option to use instead: some of Lightning's, and those computed from others.

An option either does what its help says or is refused by name before anything starts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder

# the values that are still accepted, and the fix
Replaced = tuple[tuple[Any, ...], str]
_BOTH = "which serves generator and discriminator alike"
_RUN = "checkpoints lie in the run's folder"
# refused in every run
REPLACED: dict[str, Replaced] = {
    "trainer.precision": ((None, 32, "32", "32-true", "bf16", "bf16-mixed"), "train in 32-true or bf16-mixed"),
    "trainer.overfit_batches": ((0, 0.0), "set trainer.limit_train_batches instead"),
    "trainer.reload_dataloaders_every_n_epochs": ((0,), "every epoch already has its own order of pictures: leave it out"),
    "trainer.enable_checkpointing": ((None, True), "last.ckpt is always kept: set checkpoint.save_top_k 0 to keep no other"),
    "trainer.barebones": ((False,), "a fit needs its callbacks: set trainer.logger false and trainer.limit_val_batches 0 for speed"),
    "trainer.model_registry": ((None,), f"{_RUN}: leave it out"),
    "checkpoint.dirpath": ((None,), f"{_RUN}: set --runs, or make RUNS/NAME/checkpoints a link"),
    "checkpoint.save_last": ((None, False), "last.ckpt is always written, see last.every_n_train_steps: leave it out"),
    "checkpoint.save_on_exception": ((False,), "it would replace the best checkpoint: resume from last.ckpt, see last.every_n_train_steps"),
    "optimizer": ((None,), "it is AdamW: set model.learning_rate, model.betas and model.weight_decay"),
    "lr_scheduler": ((None,), "set model.schedule and model.warmup_steps"),
}
# refused when training a tokenizer, which has two optimizers
OF_TOKENIZERS: dict[str, Replaced] = {
    "trainer.accumulate_grad_batches": ((None, 1), f"use model.accumulate, {_BOTH}"),
    "trainer.gradient_clip_val": ((None,), f"use model.gradient_clip, {_BOTH}"),
    "trainer.gradient_clip_algorithm": ((None, "norm"), f"use model.gradient_clip, a norm, {_BOTH}"),
    "checkpoint.train_time_interval": (
        (None,),
        "Lightning ignores it in a training with two optimizers: use last.every_n_train_steps",
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
    """Raises UserError for an option that would be ignored, do harm, or fail later. `option` returns the value of an option by its name;
    `replaced` are refused in addition to REPLACED."""
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
        raise UserError(f"checkpoint.filename: {name} is one name for all of save_top_k {checkpoint.save_top_k}: put {{step}} into it")
    if name.startswith(RunFolder("").last.stem):
        raise UserError(f"checkpoint.filename: {name} is the file that --ckpt_path last resumes from: choose another")
    # a checkpoint must not be ranked by a value measured at another step
    stale = f"{monitor} is not measured at that time: leave it out, or set checkpoint.monitor null"
    if monitor is not None and steps and (monitor.startswith("val/") or logged == 0 or steps % (logged or 50)):
        raise UserError(f"checkpoint.every_n_train_steps: {stale}")
    for name in ("save_on_train_epoch_end", "train_time_interval"):
        if monitor is not None and checkpoint[name]:
            raise UserError(f"checkpoint.{name}: {stale}")
    if checkpoint.save_weights_only and option("ema_decay") is not None:
        raise UserError("checkpoint.save_weights_only: such a file lacks the averages of ema_decay: leave out one of the two options")


def check_linked(args: Sequence[str], links: Mapping[str, str | Sequence[str]]) -> None:
    """Raises UserError for an option in the command line, or in its configs, that is computed from others, which jsonargparse would
    overwrite without a word. `links` gives, of each computed option, those that decide it."""
    targets = {_path(target): target for target in links}
    for place, text in enumerate(args):
        option, equals, value = text.partition("=")
        if option.startswith("-"):
            path = () if option in ("-c", "--config") else _path(option.lstrip("-"))
            for given in _given(path, value if equals else "".join(args[place + 1 : place + 2]), targets):
                source = links[targets[given]]
                deciding = source if isinstance(source, str) else " and ".join(source)
                raise UserError(f"{targets[given]}: is computed from {deciding}: leave it out, and set that")


def _given(path: tuple[str, ...], value: Any, targets: Mapping[tuple[str, ...], str]) -> Iterator[tuple[str, ...]]:
    """The computed options that a value at `path` would set: a plain one, or a mapping, in YAML or in a YAML file."""
    if path in targets and value is not None:
        yield path
    elif any(target[: len(path)] == path for target in targets):
        if isinstance(value, str):
            with suppress(OSError, ValueError, yaml.YAMLError):  # of those the parser tells
                value = yaml.safe_load(Path(value).read_text() if value.endswith((".yaml", ".yml", ".json")) else value)
        for name, inner in value.items() if isinstance(value, Mapping) else ():
            yield from _given((*path, *_path(str(name))), inner, targets)


def _path(option: str) -> tuple[str, ...]:
    """The parts of an option's name. init_args may be left out on the command line."""
    return tuple(part for part in option.split(".") if part not in ("init_args", "dict_kwargs"))

"""The parts shared by all training runs: the folder runs/NAME, checkpoints, and the callbacks for resuming and preemption.

`files.run_folder` names the files in the folder.
"""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import SUPPRESS, ArgumentError
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from gq_lightning.callbacks import Acceleration, CheckpointFiles, Dashboard, ExactResume, LastCheckpoint, LostRanks, Outset, Preemption
from gq_lightning.callbacks.order import in_order
from gq_lightning.callbacks.watching.dashboard import Charts
from gq_lightning.cli.options import Replaced, check_linked, check_options
from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder, write_whole
from gq_lightning.lightning_internals import MisconfigurationException, OwnOptions, ProgressBar, explain_restoring, profile_nothing

# between validations, when the user gives no interval
MOST_BATCHES = 5000


def _parser_settings(commands: Iterable[str]) -> dict[str, Any]:
    settings = {"description": "Images to discrete tokens by Gaussian Quant.", "prog": "python -m gq_lightning", "exit_on_error": False}
    # Lightning takes the settings of the parser and of each command's parser
    return settings | {command: {"exit_on_error": False} for command in commands}


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        write_whole(RunFolder(trainer.default_root_dir).config, text.encode())


class RunCommandLine(OwnOptions):
    """`fit`, `validate`, `test` and `predict` of one training module on one kind of data. `monitor` is the metric that chooses the best
    checkpoint, and "max" or "min"; `replaced` are options that it refuses in addition to those of every run, see `options`."""

    module: ClassVar[type[LightningModule]]
    data: ClassVar[type[LightningDataModule]]
    monitor: ClassVar[tuple[str, str]]
    replaced: ClassVar[Mapping[str, Replaced]] = {}

    @abstractmethod
    def own_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The callbacks of this kind of run, in addition to those of every run and those given by the user."""

    @abstractmethod
    def dashboard(self) -> tuple[Charts, list[str]]:
        """TensorBoard's charts, and the scalars by which runs compare."""

    def __init__(self, args: list[str], run: bool = True) -> None:
        self._overwritten: RunFolder | None = None
        if run and args[0] in (every := self.subcommands()):
            # building the parsers of the other commands would take twice the time of building this one
            self.subcommands = lambda: {args[0]: every[args[0]]}  # type: ignore[method-assign]
        with ExitStack() as self._until_the_end:
            super().__init__(
                self.module,
                self.data,
                # the other commands must not overwrite the config of the run that they measure
                save_config_callback=SaveConfig if args[:1] == ["fit"] else None,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_class=Trainer,
                subclass_mode_data=True,
                args=args,
                run=run,
                auto_configure_optimizers=False,
                parser_kwargs=_parser_settings(self.subcommands() if run else ()),
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_linked(args, self.links)
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", default="default", help="name of the run; its folder is RUNS/NAME")
        parser.add_argument("--runs", default="runs", help="folder of all runs")
        parser.add_argument("--overwrite", type=bool, default=False, help="let fit overwrite a run of the same name")
        parser.add_argument(
            "--ema_decay", type=float | None, default=None, help="decay of an average of the weights, for evaluation and export"
        )
        for replaced in ("optimizer", "lr_scheduler"):  # an earlier config.yaml may hold them as null
            parser.add_argument(f"--{replaced}", type=Any, default=None, help=SUPPRESS)
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads per process; null leaves it to torch")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Acceleration, "acceleration")
        parser.set_defaults(
            {
                "checkpoint.monitor": self.monitor[0],
                "checkpoint.mode": self.monitor[1],
                # save before the epoch ends, so that the last checkpoint, written next, records the best one
                "checkpoint.save_on_train_epoch_end": False,
                "checkpoint.filename": RunFolder("").best.stem,
                "checkpoint.enable_version_counter": False,
                # null for both intervals gives ten validations, see Outset
                "trainer.check_val_every_n_epoch": None,
            }
        )
        parser.link_arguments(("runs", "name"), "trainer.default_root_dir", compute_fn=lambda runs, name: str(Path(runs) / name))

    def before_instantiate_classes(self) -> None:
        check_options(lambda option: self._get(self.config, option), self.replaced)
        if (threads := self._get(self.config, "threads")) is not None:
            torch.set_num_threads(threads)
        if not (parts := Path(name := self._get(self.config, "name")).parts) or ".." in parts:
            raise UserError(f"--name {name}: leads out of the folder of runs: give a name such as mine")
        run = RunFolder(self._get(self.config, "trainer.default_root_dir"))
        if self.subcommand is not None:
            self._checkpoint = self._find_checkpoint(run)
        if self.subcommand == "fit" and not self._get(self.config, "trainer.fast_dev_run"):
            asked = self._get(self.config, "ckpt_path")
            go_on = asked in ("last", "best") or (asked is not None and Path(asked).absolute().is_relative_to(run.path.absolute()))
            overwrite = self._get(self.config, "overwrite")
            self._until_the_end.enter_context(run.claimed(go_on, overwrite))
            self._overwritten = run if overwrite and not go_on else None

    def _find_checkpoint(self, run: RunFolder) -> str | None:
        """The file that `--ckpt_path` names; None for a new training."""
        asked = self._get(self.config, "ckpt_path")
        path = {"last": run.last, "best": run.best}.get(str(asked), asked)
        if asked and ("://" in str(path) or Path(path).exists()):
            return str(path)
        if self.subcommand == "fit" and asked in (None, "last"):
            if asked:  # so that one command both starts and resumes a run
                rank_zero_info(f"{run.checkpoints}: no last checkpoint yet, so the training starts from the beginning")
            return None
        there = ", ".join(map(str, sorted(run.checkpoints.glob("*.ckpt")))) or f"{run.checkpoints} has none"
        wrong = f"no checkpoint to {self.subcommand}" if asked is None else f"{path}: no such checkpoint"
        raise UserError(f"{wrong}: give --ckpt_path last, best or a file: {there}")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ImportError, TypeError, ValueError) as error:
            raise refused(error) from error

    def before_fit(self) -> None:
        # model, trainer and data are known to be usable by now: a run that is refused must not cost the old one
        if self._overwritten is not None:
            self.datamodule.prepare_data()
            self.datamodule.evaluation_set()
            self._overwritten.clear()

    def after_instantiate_classes(self) -> None:
        if self.subcommand is not None:
            self.config_init[self.subcommand].ckpt_path = self._checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run = RunFolder(self._get(self.config_init, "trainer.default_root_dir"))
        given = self._get(self.config_init, "trainer.callbacks") or []
        given = given if isinstance(given, list) else [given]
        callbacks = [ExactResume(), Preemption(), LostRanks(), *self.own_callbacks(given)]
        bars = any(isinstance(callback, AnyProgressBar) for callback in given)
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False and not bars:
            callbacks.append(ProgressBar())
        interval, epochs = (self._get(self.config_init, f"trainer.{name}") for name in ("val_check_interval", "check_val_every_n_epoch"))
        callbacks.append(Outset(MOST_BATCHES if interval is None and epochs is None else None))
        if interval is None and epochs is None:
            kwargs["val_check_interval"] = MOST_BATCHES
        elif isinstance(interval, float) and epochs is None:
            kwargs["check_val_every_n_epoch"] = 1  # the interval is a share of an epoch
        if (decay := self._get(self.config_init, "ema_decay")) is not None:
            # the buffers are the multipliers and the codebook, which must be copied, not averaged
            callbacks.append(EMAWeightAveraging(decay=decay, use_buffers=False))
        logger = self._get(self.config_init, "trainer.logger")
        if self.subcommand not in (None, "fit"):
            kwargs["logger"] = False  # the curves belong to the training
        elif logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(run.path.parent, name=run.path.name, version="")
        if kwargs.get("logger", logger):
            own = settings(yaml.safe_load(self.changed_options()))
            callbacks += [LearningRateMonitor("step"), Dashboard(own, *self.dashboard())]
        checkpoint = self._get(self.config_init, "checkpoint")
        if checkpoint.save_top_k not in (0, 1) and checkpoint.filename == run.best.stem:
            checkpoint.filename = f"{run.best.stem}-{{step}}"
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        kwargs["callbacks"] = [*callbacks, *given]
        trainer = super().instantiate_trainer(**kwargs)
        explain_restoring(trainer)
        profile_nothing(trainer)
        for callback in trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(run.checkpoints)  # not the logger's folder
        trainer.callbacks = in_order(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer


def settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The config of model, data and length, flat: `backbone: UNet`, `backbone.channels: 64`, …"""
    found: dict[str, bool | int | float | str] = {}

    def collect(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            if "class_path" in value:
                found[name.removeprefix("model.")] = value["class_path"].rpartition(".")[2]
            for key, inner in {**value, **(value.get("init_args") or {})}.items():
                if key not in ("class_path", "init_args"):
                    collect(f"{name}.{key}", inner)
        elif isinstance(value, bool | int | float | str):
            found[name.removeprefix("model.")] = value
        elif value is not None:
            found[name.removeprefix("model.")] = str(value)

    for name in ("model", "data", "seed_everything", "ema_decay"):
        collect(name, config.get(name))
    for name in ("max_steps", "max_epochs", "precision"):
        collect(name, config.get("trainer", {}).get(name))
    return found


def refused(error: BaseException) -> UserError:
    """The UserError within an error that jsonargparse has wrapped, or the error itself as a UserError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause or UserError(" ".join(str(error).split()))


def call(command_line: Callable[[list[str]], object], args: list[str], name: str) -> None:
    """Runs a command; `name` is its name in messages. Raises UserError if the arguments do not fit the parser or one another."""
    # an advertisement, and advice about workers that pictures in memory do not need
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # an encoder that is kept
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    # the state after the step is the one to keep
    warnings.filterwarnings("ignore", message=".*no pre-optimization state was saved.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    try:
        command_line(args)
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())} (see python -m gq_lightning {name} --help)") from error
    except (MisconfigurationException, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error

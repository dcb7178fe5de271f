"""What every training run has, whatever it trains: its folder runs/NAME, its checkpoints, and the callbacks that keep it alive.

What is in the folder stands in `files.run_folder`.
"""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from gq_lightning.callbacks import Acceleration, CheckpointFiles, ExactResume, LastCheckpoint, LostRanks, Preemption
from gq_lightning.callbacks.order import in_order
from gq_lightning.errors import UserError
from gq_lightning.files import RunFolder, write_whole
from gq_lightning.lightning_internals import MisconfigurationException, ProgressBar


def _parser_settings(commands: Iterable[str]) -> dict[str, Any]:
    settings = {"description": "Images to discrete tokens by Gaussian Quant.", "prog": "python -m gq_lightning", "exit_on_error": False}
    # Lightning takes the settings of the parser and of each command's parser
    return settings | {command: {"exit_on_error": False} for command in commands}


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        write_whole(RunFolder(trainer.default_root_dir).config, text.encode())


class RunCommandLine(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of one training module on one kind of data.

    Attributes:
        module, data: their classes.
        monitor: the metric that the best checkpoint has the most or the least of, and "max" or "min".
    """

    module: ClassVar[type[LightningModule]]
    data: ClassVar[type[LightningDataModule]]
    monitor: ClassVar[tuple[str, str]]

    @abstractmethod
    def own_callbacks(self) -> list[Callback]:
        """Those of this kind of run, beside the ones that all have."""

    def __init__(self, args: list[str], run: bool = True) -> None:
        with ExitStack() as self._until_the_end:
            super().__init__(
                self.module,
                self.data,
                # validate and its like must not write over the config of the run that they look at
                save_config_callback=SaveConfig if args[:1] == ["fit"] else None,
                # to the logger's folder, Lightning means
                save_config_kwargs={"save_to_log_dir": False},
                trainer_class=Trainer,
                subclass_mode_data=True,
                args=args,
                run=run,
                parser_kwargs=_parser_settings(self.subcommands() if run else ()),
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", default="default", help="name of the run; its folder is RUNS/NAME")
        parser.add_argument("--runs", default="runs", help="folder of all runs")
        parser.add_argument("--overwrite", type=bool, default=False, help="let fit write over a run of the same name")
        parser.add_argument(
            "--ema_decay", type=float | None, default=None, help="decay of an average of the weights, for evaluation and export"
        )
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads per process; null leaves it to torch")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(Acceleration, "acceleration")
        parser.set_defaults(
            {
                "checkpoint.monitor": self.monitor[0],
                "checkpoint.mode": self.monitor[1],
                # before the epoch ends, so that the last checkpoint, which comes next, knows of it
                "checkpoint.save_on_train_epoch_end": False,
                "checkpoint.filename": RunFolder("").best.stem,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments(("runs", "name"), "trainer.default_root_dir", compute_fn=lambda runs, name: str(Path(runs) / name))

    def before_instantiate_classes(self) -> None:
        if (threads := self._get(self.config, "threads")) is not None:
            torch.set_num_threads(threads)
        run = RunFolder(self._get(self.config, "trainer.default_root_dir"))
        if self.subcommand == "fit" and not self._get(self.config, "trainer.fast_dev_run"):
            go_on = bool(self._get(self.config, "ckpt_path"))
            self._until_the_end.enter_context(run.claimed(go_on, self._get(self.config, "overwrite")))
        checkpoints = Path(self._get(self.config, "checkpoint.dirpath") or run.checkpoints)
        if self._get(self.config, "ckpt_path") == "last" and not any(checkpoints.glob("last*.ckpt")):
            if self.subcommand != "fit":
                raise UserError(f"{checkpoints}: there is no last checkpoint to {self.subcommand}: give --ckpt_path a file")
            # so that one command serves to begin and to go on
            rank_zero_info(f"{checkpoints}: no last checkpoint yet, the training begins at its beginning")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run = RunFolder(self._get(self.config_init, "trainer.default_root_dir"))
        callbacks = [ExactResume(), Preemption(), LostRanks(), *self.own_callbacks()]
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False:
            callbacks.append(ProgressBar())
        if (decay := self._get(self.config_init, "ema_decay")) is not None:
            # buffers are the multipliers and the codebook: they are copied, an average of them means nothing
            callbacks.append(EMAWeightAveraging(decay=decay, use_buffers=False))
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(run.path.parent, name=run.path.name, version="")
            callbacks.append(LearningRateMonitor("step"))
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.dirpath = checkpoint.dirpath or str(run.checkpoints)  # and not the logger's folder
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        extra = self._get(self.config_init, "trainer.callbacks") or []
        kwargs["callbacks"] = [*callbacks, *(extra if isinstance(extra, list) else [extra])]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks = in_order(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer


def call(command_line: Callable[[list[str]], object], args: list[str], name: str) -> None:
    """Runs a command; `name` is what messages call it.

    Raises:
        UserError: arguments that do not fit the parser or one another.
    """
    # advice about a product, and about workers where photographs in memory need none
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # the state after the step is the one to keep
    warnings.filterwarnings("ignore", message=".*no pre-optimization state was saved.*")
    # said by us
    warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    try:
        command_line(args)
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())} (see python -m gq_lightning {name} --help)") from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        # jsonargparse wraps what a constructor raises, in layers
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise error if cause is None else cause from error

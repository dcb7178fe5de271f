"""Lays out TensorBoard: related scalars in one chart, and a table of the runs' settings and results."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from gq_lightning.evaluation.report import validation_charts

# title of a section -> title of a chart -> regular expressions for the scalars that it shows
Charts = Mapping[str, Mapping[str, Iterable[str]]]
# prefix of scalars that only the charts need
EXTRA = "chart"


class Dashboard(Callback):
    """Writes the layout of TensorBoard's Custom Scalars tab, in which a chart shows those of its scalars that the run logs, and the run's
    row in its HParams table, with its settings and the newest value of each result. Other loggers get the settings."""

    def __init__(self, settings: Mapping[str, bool | int | float | str], charts: Charts, results: Iterable[str]) -> None:
        self.settings, self.charts, self.results = dict(settings), charts, tuple(results)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                # at the start, so that the table also has unfinished runs
                experiment, start, _ = self._row()
                for summary in (experiment, start):
                    logger.experiment.file_writer.add_summary(summary)
                sections = {
                    section: {title: ["Multiline", list(tags)] for title, tags in charts.items()} for section, charts in self.charts.items()
                }
                logger.experiment.add_custom_scalars(sections)
            else:
                logger.log_hyperparams(self.settings)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in tensor_boards(trainer):
            logger.experiment.file_writer.add_summary(self._row()[2])
            logger.save()

    def _row(self) -> tuple[Any, Any, Any]:
        """Summaries of the table's columns, and of the run's start and end."""
        return hparams(self.settings, dict.fromkeys(self.results, 0.0))


def log_for_charts(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Logs scalars for the charts to TensorBoard. Other loggers have the values that they are computed from."""
    for logger in tensor_boards(trainer):
        for name, value in values.items():
            logger.experiment.add_scalar(f"{EXTRA}/{name}", value, step)


def tensor_boards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers to TensorBoard, on the first rank."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)] if trainer.is_global_zero else []


def charts_of_tokenizers() -> Charts:
    return {
        "Target divergence": {
            "bits per token": [r"^bits/(min|mean|max)$", rf"^{EXTRA}/target_(low|high)$"],
            "multipliers, log10": [rf"^{EXTRA}/log10_lambda_(min|mean|max)$"],
        },
        "Validation: tokens and Gaussian VAE": validation_charts(),
        "Training": {"loss": [r"^loss$", r"^loss/"], "images per second": [r"^images_per_second$"]},
    }


def charts_of_priors() -> Charts:
    return {"Bits per pixel": {"training, validation, uniform and order-0 models": [r"^bits_per_pixel$", r"^val/bits_per_pixel"]}}

"""What people are shown of a tokenizer's metrics: a table, and the numbers by which tokenizers compare."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gq_lightning.metrics import GAUSSIAN, METRICS, Number, numbers
from gq_lightning.metrics.codebook import collapse


def metrics_table(values: Mapping[str, float], title: str) -> Group:
    """A row per measured metric, image metrics first: of the tokens, and of the Gaussian VAE that they replace.

    A collapsed codebook is warned of below.
    """
    both = any(name.startswith(GAUSSIAN) for name in values)
    table = Table("metric", "tokens", *(["Gaussian VAE"] if both else []), title=title, title_justify="left")
    for of_images in (True, False):
        for number in (number for metric in METRICS if metric.of_images == of_images for number in metric.numbers):
            if number.name in values:
                gaussian = GAUSSIAN + number.name
                beside = number.show(values[gaussian]) if gaussian in values else "-" if of_images and both else ""
                table.add_row(number.heading, number.show(values[number.name]), *([beside] if both else []))
        table.add_section()
    warning = collapse(values)
    return Group(table, *([] if warning is None else [Text(warning, style="bold red")]))


def compared() -> dict[str, Number]:
    """The numbers with a better direction, by which tokenizers compare."""
    return {name: number for name, number in numbers().items() if number.better}


def validation_charts() -> dict[str, list[str]]:
    """Of each compared number of images, the scalars of validation: of the tokens, and of the Gaussian VAE."""
    return {number.heading: [rf"^val/({GAUSSIAN})?{name}$"] for name, number in compared().items() if GAUSSIAN + name in compared()}

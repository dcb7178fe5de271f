"""A table of metrics: the tokens and the Gaussian VAE that they replace, side by side."""

from collections.abc import Mapping

from rich.table import Table

from gq_lightning.metrics.reconstruction import GAUSSIAN, METRICS


def metrics_table(values: Mapping[str, float], title: str) -> Table:
    """A table with a row per metric, image metrics first, without those that were not measured."""
    both = any(name.startswith(GAUSSIAN) for name in values)
    table = Table("metric", "tokens", *(["Gaussian VAE"] if both else []), title=title, title_justify="left")
    for of_images in (True, False):
        for number in (number for metric in METRICS if metric.of_images == of_images for number in metric.numbers):
            if number.name in values:
                gaussian = GAUSSIAN + number.name
                beside = number.show(values[gaussian]) if gaussian in values else "-" if of_images and both else ""
                table.add_row(number.heading, number.show(values[number.name]), *([beside] if both else []))
        table.add_section()
    return table

"""The points of a figure: means of arms over their seeds, and published numbers."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gq_lightning.metrics import Number

Plot = dict[str, Any]
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Point:
    """A mean over seeds: `values` by metric, each with the smallest and largest."""

    series: str
    style: str
    x: float
    seeds: int
    values: dict[str, Spread]


def spread(numbers: Iterable[float]) -> Spread:
    """Mean, smallest and largest."""
    several = [float(number) for number in numbers]
    low, high = min(several), max(several)
    # rounding may move the mean of equal numbers outside their range
    return min(max(statistics.fmean(several), low), high), low, high


def points(plot: Plot, measured: Iterable[dict[str, Any]]) -> list[Point]:
    """The measured points, in the order of the arms. They also have `lost`, the Gaussian PSNR minus that of the tokens."""
    groups: dict[tuple[str, str, float], list[dict[str, float]]] = defaultdict(list)
    for content in measured:
        arm, metrics = content["arm"], content["metrics"]
        lost = {"lost": metrics["gaussian_psnr"] - metrics["psnr"]} if {"gaussian_psnr", "psnr"} <= metrics.keys() else {}
        groups[arm[plot["series"]], arm[plot["style"]], metrics[plot["x"]]].append(metrics | lost)
    found = []
    for (series, style, x), several in groups.items():
        names = [name for name in (*plot["y"], "lost", "share_within_alpha") if any(name in metrics for metrics in several)]
        values = {name: spread(metrics[name] for metrics in several if name in metrics) for name in names}
        found.append(Point(series, style, x, len(several), values))
    return found


def published_points(plot: Plot, published: dict[str, Any]) -> list[Point]:
    """The points of the published series."""
    found = []
    for series in published["series"]:
        for i, x in enumerate(published[plot["x"]]):
            values = {name: spread([series[name][i]]) for name in plot["y"] if name in series}
            found.append(Point(series[plot["series"]], series[plot["style"]], x, 1, values))
    return found


def label(plot: Plot, value: str) -> str:
    return plot.get("labels", {}).get(value) or number(value).label


def number(name: str) -> "Number":
    """What the package says of a metric: its label, format, direction and kind of axis. Anything else has its name alone."""
    from gq_lightning.metrics import Number, numbers  # torchmetrics takes seconds to import

    if name == "lost":
        return Number("lost", "PSNR lost, dB", ".3f", "lower")
    return numbers().get(name) or Number(name, name, ".4g")

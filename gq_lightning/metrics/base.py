"""Metric: the base class of everything that is measured over all images of all processes.

A metric is one file. It defines its numbers with their directions and formats, its state with the reduction over processes, and the
measurement. The logs, metrics.json and its protocol, the report, and the experiments' figures and tables need nothing else.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torchmetrics
from torch import Tensor

from gq_lightning.quantizers.base import Quantizer

ARROWS = {"higher": " \N{UPWARDS ARROW}", "lower": " \N{DOWNWARDS ARROW}", None: ""}


@dataclass(frozen=True)
class Number:
    """A value that a metric reports.

    Attributes:
        name: name in metrics.json and the logs.
        label: label in tables and on axes, with the unit.
        form: format specification, as in f"{value:.2f}".
        better: the better direction, if there is one.
        logarithmic: whether to plot it on a logarithmic axis.
        constant: whether it is the same at every validation of a run, so that a curve of it says nothing.
    """

    name: str
    label: str
    form: str
    better: Literal["higher", "lower"] | None = None
    logarithmic: bool = False
    constant: bool = False

    @property
    def heading(self) -> str:
        """The label, with an arrow in the better direction."""
        return self.label + ARROWS[self.better]

    def show(self, value: float) -> str:
        return format(value, self.form)


class Metric(torchmetrics.Metric):
    """A torchmetrics `Metric`, constructed for a quantizer. `add_state` declares its state, which torchmetrics reduces over processes.

    `update` receives those of the following that its signature names. It must not change its state in place, since the state may be an
    inference tensor.

        originals, images: (B, 3, H, W) float32 on the scale 0..255, not rounded.
        tokens: (B, h, w, tokens_per_position) int64.
        bits: KL of each token, (B, h, w, tokens_per_position), or None if the quantizer has no posterior.

    `compute` returns plain numbers by name and omits those that cannot be measured.

    Attributes:
        numbers: the numbers that `compute` returns.
        protocol: how it measures, for JSON.
        of_images: whether it compares images. If so, it also measures the images of the Gaussian posterior, with the prefix `gaussian_`.
        costly: whether it takes more time than everything else. If so, only `test` and the end of fit compute it, where it can be turned
            off.
    """

    full_state_update = False
    numbers: ClassVar[tuple[Number, ...]]
    protocol: ClassVar[Mapping[str, Any]] = {}
    of_images: ClassVar[bool] = False
    costly: ClassVar[bool] = False

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()


class ImageMetric(Metric):
    """The mean over all images of a number per image. Images with a side shorter than `smallest_side` pixels are left out."""

    of_images = True
    smallest_side: ClassVar[int] = 1
    count: Tensor
    total: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        """The number of each image, (B,), from images (B, 3, H, W) on the scale 0..255."""

    def update(self, images: Tensor, originals: Tensor) -> None:
        if min(images.shape[-2:]) >= self.smallest_side:
            values = self.of_each(images, originals)
            self.count, self.total = self.count + len(values), self.total + values.double().sum()

    def compute(self) -> dict[str, float]:
        return {self.numbers[0].name: (self.total / self.count).item()} if self.count else {}

"""Metric: one thing that is measured on all images of all processes, and how people read its numbers.

A metric is one file: its numbers with their directions and formats, its state with the reduction over processes, and how it measures.
The logs, metrics.json and its protocol, the report, and the experiments' figures and tables read nothing else.
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
    """What a metric gives.

    Attributes:
        name: in metrics.json and the logs.
        label: in tables and on axes, with the unit.
        form: format of its values there, as in f"{value:.2f}".
        better: which way is better, if either is.
        logarithmic: whether an axis of it is.
    """

    name: str
    label: str
    form: str
    better: Literal["higher", "lower"] | None = None
    logarithmic: bool = False

    @property
    def heading(self) -> str:
        """The label, with an arrow that says which way is better."""
        return self.label + ARROWS[self.better]

    def show(self, value: float) -> str:
        return format(value, self.form)


class Metric(torchmetrics.Metric):
    """A torchmetrics `Metric`, made for a quantizer. `add_state` declares its state, which torchmetrics reduces over the processes.

    `update` names what it wants of a batch, and gets that alone. It changes no state in place, which may be an inference tensor.

        originals, images: (B, 3, H, W) float32 on the scale 0..255, not rounded.
        tokens: (B, h, w, tokens_per_position) int64.
        bits: KL of each token, (B, h, w, tokens_per_position), or None where the quantizer has no posterior.

    `compute` gives plain numbers by name, and leaves out those that cannot be measured.

    Attributes:
        numbers: what `compute` gives.
        protocol: how it measures, for JSON.
        of_images: whether it compares images: it then measures those of the Gaussian posterior, too, under the prefix `gaussian_`.
        costly: whether it takes more time than all else: it is left to `test` and the end of fit, and may be turned off there.
    """

    full_state_update = False
    numbers: ClassVar[tuple[Number, ...]]
    protocol: ClassVar[Mapping[str, Any]] = {}
    of_images: ClassVar[bool] = False
    costly: ClassVar[bool] = False

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()


class ImageMetric(Metric):
    """The mean, over all images, of a number that each image has. Images of fewer than `smallest_side` pixels are left out."""

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
        """The number of each image, (B,), of images (B, 3, H, W) on the scale 0..255."""

    def update(self, images: Tensor, originals: Tensor) -> None:
        if min(images.shape[-2:]) >= self.smallest_side:
            values = self.of_each(images, originals)
            self.count, self.total = self.count + len(values), self.total + values.double().sum()

    def compute(self) -> dict[str, float]:
        return {self.numbers[0].name: (self.total / self.count).item()} if self.count else {}

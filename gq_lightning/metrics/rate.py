"""The rate in bits per pixel, and the numbers of images and tokens measured."""

import torch
from torch import Tensor

from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import Quantizer


class Rate(Metric):
    numbers = (
        Number("bits_per_pixel", "bits per pixel", ".4g", constant=True),
        Number("images", "images", ",.0f", constant=True),
        Number("tokens", "tokens", ",.0f", constant=True),
    )
    counts: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.bits_per_token = quantizer.bits_per_position / quantizer.tokens_per_position
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, originals: Tensor, tokens: Tensor) -> None:
        batch, _, height, width = originals.shape
        self.counts = self.counts + self.counts.new_tensor([batch, batch * height * width, tokens.numel()])

    def compute(self) -> dict[str, float | int]:
        images, pixels, tokens = self.counts.tolist()
        return {"bits_per_pixel": tokens * self.bits_per_token / pixels, "images": images, "tokens": tokens} if pixels else {"images": 0}

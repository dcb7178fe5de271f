"""What the tokens cost: bits per pixel, and how many images and tokens were measured."""

import torch
from torch import Tensor

from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import Quantizer


class Rate(Metric):
    numbers = (
        Number("bits_per_pixel", "bits per pixel", ".4g"),
        Number("images", "images", ",d"),
        Number("tokens", "tokens", ",d"),
    )
    images: Tensor
    pixels: Tensor
    tokens: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.bits_per_token = quantizer.bits_per_position / quantizer.tokens_per_position
        for name in ("images", "pixels", "tokens"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, originals: Tensor, tokens: Tensor) -> None:
        batch, _, height, width = originals.shape
        self.images, self.pixels = self.images + batch, self.pixels + batch * height * width
        self.tokens = self.tokens + tokens.numel()

    def compute(self) -> dict[str, float | int]:
        images, pixels, tokens = int(self.images), int(self.pixels), int(self.tokens)
        return {"bits_per_pixel": tokens * self.bits_per_token / pixels, "images": images, "tokens": tokens} if pixels else {"images": 0}

"""The divergence of each token's posterior, in bits, compared with the codebook's (arXiv 2512.06609, section 3)."""

import math

import torch
from torch import Tensor

from gq_lightning.metrics.base import Metric, Number
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer

ALPHA = 0.5


class Bits(Metric):
    """Statistics over all tokens. A token is within alpha if its bits differ from log2(codebook_size) by at most the TDC's `alpha`, or
    `ALPHA` without a TDC."""

    numbers = (
        Number("bits_mean", "bits per token, mean", ".2f"),
        Number("bits_min", "bits per token, min", ".2f"),
        Number("bits_max", "bits per token, max", ".2f"),
        Number("bits_std", "bits per token, deviation", ".2f"),
        Number("share_within_alpha", "tokens within target ± alpha", ".1%", "higher"),
    )
    sums: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        tdc = quantizer.tdc if isinstance(quantizer, PosteriorQuantizer) else None
        self.target, self.alpha = math.log2(quantizer.codebook_size), ALPHA if tdc is None else tdc.alpha
        # number of tokens, sum of bits - target, sum of its squares, number within alpha
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lowest", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, bits: Tensor | None) -> None:
        if bits is None:
            return
        deviation = bits.double().flatten() - self.target
        within = (deviation.abs() <= self.alpha).sum()
        count = deviation.new_tensor(deviation.numel())
        self.sums = self.sums + torch.stack((count, deviation.sum(), deviation.square().sum(), within.double()))
        self.lowest, self.highest = torch.minimum(self.lowest, bits.min().float()), torch.maximum(self.highest, bits.max().float())

    def compute(self) -> dict[str, float]:
        count, deviation, squares, within = self.sums.tolist()
        if not count:
            return {}
        mean = deviation / count
        return {
            "bits_min": self.lowest.item(),
            "bits_mean": self.target + mean,
            "bits_max": self.highest.item(),
            "bits_std": math.sqrt(max(squares / count - mean**2, 0)),
            "share_within_alpha": within / count,
        }

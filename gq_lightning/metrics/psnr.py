"""PSNR of each image over all channels, averaged over images, as in arXiv 2512.06609 (section 5)."""

from typing import ClassVar

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from gq_lightning.metrics.base import ImageMetric, Number

CAP = 100.0  # dB; identical images would give infinity, which breaks means and JSON


class PSNR(ImageMetric):
    numbers = (Number("psnr", "PSNR, dB", ".2f", "higher"),)
    protocol: ClassVar = {"psnr": f"per image over all channels, then the mean; 0..255, not rounded; at most {CAP:g} dB"}

    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        return peak_signal_noise_ratio(images, originals, data_range=255.0, dim=(1, 2, 3), reduction="none").clamp(max=CAP)

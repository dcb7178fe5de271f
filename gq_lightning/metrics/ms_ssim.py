"""Multi-scale SSIM averaged over images, as in pytorch_msssim: per channel, on as many levels as fit."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from gq_lightning.metrics.base import ImageMetric, Number
from gq_lightning.metrics.ssim import OPTIONS, PROTOCOL, WINDOW, ssim

LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik, 2003


def fitting_levels(side: int) -> int:
    """Number of levels, 2 to 5, that the window fits into when the shorter side has `side` pixels; 0 if it is fewer than two."""
    fitting = [level for level in range(2, len(LEVEL_WEIGHTS) + 1) if side > (WINDOW - 1) * 2 ** (level - 1)]
    return max(fitting, default=0)


def ms_ssim(images: Tensor, targets: Tensor, levels: int) -> Tensor:
    """Multi-scale structural similarity of each image (B, C, H, W) on the scale 0..255, on its first `levels` levels: (B,)."""
    weights = images.new_tensor(LEVEL_WEIGHTS[:levels])
    weights = weights / weights.sum()
    batch, channels = images.shape[:2]
    # (B * C, 1, H, W): each channel is a separate image
    images, targets = images.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
    result = images.new_ones(batch * channels)
    for level in range(levels - 1):
        _, contrast = structural_similarity_index_measure(images, targets, return_contrast_sensitivity=True, **OPTIONS)
        result = result * torch.as_tensor(contrast).relu() ** weights[level]
        odd = [side % 2 for side in images.shape[2:]]
        images, targets = (functional.avg_pool2d(side, kernel_size=2, padding=odd) for side in (images, targets))
    result = result * ssim(images, targets).relu() ** weights[-1]
    return result.unflatten(0, (batch, channels)).mean(dim=1)


class MSSSIM(ImageMetric):
    numbers = (Number("ms_ssim", "MS-SSIM", ".4f", "higher"),)
    smallest_side = 2 * WINDOW - 1  # of two levels
    levels = "Wang's weights, made to sum to 1, of the levels that fit: 5 from 161 pixels on, none under 21"
    protocol: ClassVar = {"ms_ssim": f"{PROTOCOL}; {levels}"}

    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        return ms_ssim(images, originals, fitting_levels(min(images.shape[-2:])))

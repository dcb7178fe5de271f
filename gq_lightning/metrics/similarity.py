"""PSNR, SSIM and MS-SSIM of each image, the definitions behind the numbers of arXiv 2512.06609 (section 5; pytorch_msssim's).

Images are (B, C, H, W) float32 on the scale 0..255, not rounded. The engine is torchmetrics; what differs from its own defaults:
SSIM is averaged where the whole window lies inside the image, MS-SSIM is taken per channel, then averaged.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

DATA_RANGE = 255.0
PSNR_CAP = 100.0  # dB; identical images would give infinity, which JSON cannot hold and a mean cannot bear
WINDOW, SIGMA = 11, 1.5
_OPTIONS: dict[str, Any] = {"kernel_size": WINDOW, "sigma": SIGMA, "data_range": DATA_RANGE, "reduction": "none"}
LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik, 2003


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, at most `PSNR_CAP`: (B,)."""
    ratio = peak_signal_noise_ratio(images, targets, data_range=DATA_RANGE, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=PSNR_CAP)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image: (B,). Needs `WINDOW` pixels along each side."""
    _, similarity = structural_similarity_index_measure(images, targets, return_full_image=True, **_OPTIONS)
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return torch.as_tensor(similarity)[..., inside, inside].mean(dim=(1, 2, 3))


def ms_ssim_levels(side: int) -> int:
    """The levels that the window fits into, 2 to 5, for images whose shorter side has `side` pixels; 0 where it is only one or none."""
    fitting = [level for level in range(2, len(LEVEL_WEIGHTS) + 1) if side > (WINDOW - 1) * 2 ** (level - 1)]
    return max(fitting, default=0)


def ms_ssim(images: Tensor, targets: Tensor, levels: int) -> Tensor:
    """Multi-scale structural similarity of each image: (B,); the weights of the first `levels` levels, made to sum to 1."""
    weights = images.new_tensor(LEVEL_WEIGHTS[:levels])
    weights = weights / weights.sum()
    batch, channels = images.shape[:2]
    # (B * C, 1, H, W): each channel an image of its own
    images, targets = images.flatten(0, 1)[:, None], targets.flatten(0, 1)[:, None]
    result = images.new_ones(batch * channels)
    for level in range(levels - 1):
        _, contrast = structural_similarity_index_measure(images, targets, return_contrast_sensitivity=True, **_OPTIONS)
        result = result * torch.as_tensor(contrast).relu() ** weights[level]
        odd = [side % 2 for side in images.shape[2:]]
        images, targets = (functional.avg_pool2d(side, kernel_size=2, padding=odd) for side in (images, targets))
    result = result * ssim(images, targets).relu() ** weights[-1]
    return result.unflatten(0, (batch, channels)).mean(dim=1)

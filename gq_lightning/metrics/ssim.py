"""SSIM averaged over images, as in pytorch_msssim and arXiv 2512.06609 (section 5).

Computed by torchmetrics, but averaged only where the whole window is inside the image.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from gq_lightning.metrics.base import ImageMetric, Number

WINDOW, SIGMA = 11, 1.5
OPTIONS: dict[str, Any] = {"kernel_size": WINDOW, "sigma": SIGMA, "data_range": 255.0, "reduction": "none"}
PROTOCOL = f"Gaussian window {WINDOW}, sigma {SIGMA}, inside the image only, data range 255, mean of RGB"


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (B, C, H, W) on the scale 0..255: (B,). Needs `WINDOW` pixels along each side."""
    _, similarity = structural_similarity_index_measure(images, targets, return_full_image=True, **OPTIONS)
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return torch.as_tensor(similarity)[..., inside, inside].mean(dim=(1, 2, 3))


class SSIM(ImageMetric):
    numbers = (Number("ssim", "SSIM", ".4f", "higher"),)
    smallest_side = WINDOW
    protocol: ClassVar = {"ssim": PROTOCOL}

    def of_each(self, images: Tensor, originals: Tensor) -> Tensor:
        return ssim(images, originals)

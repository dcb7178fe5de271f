"""Reconstruction loss of https://arxiv.org/abs/2512.06609: (pixel distance + LPIPS) with a learned variance."""

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from gq_lightning.errors import UserError
from gq_lightning.weights.lpips import LPIPS


@final
class ReconstructionLoss(nn.Module):
    """Summed over the pixels and channels of an image and averaged over the batch, to be comparable with bits summed over an image.

    Args:
        pixel: distance per pixel and channel, `l1` (the paper) or `l2`, on values in [-1, 1].
        lpips_weight: weight of the image's LPIPS distance, which is added to each of its values; 0 turns it off.
        lpips_network: trunk of LPIPS, `vgg` (the paper) or `alex` (about 20 times cheaper).
        lpips_share: share of each batch, its first images, on which LPIPS is computed; the expected loss does not change. At 32x32
            pixels LPIPS takes as long as a small network.
        learned_variance: divide by exp(s) and add s per pixel and channel, with a learned scalar s: the negative log-likelihood of a
            Laplace or normal output with a learned scale (the paper).
    """

    def __init__(
        self,
        pixel: Literal["l1", "l2"] = "l1",
        lpips_weight: float = 1.0,
        lpips_network: Literal["vgg", "alex"] = "vgg",
        lpips_share: float = 1.0,
        learned_variance: bool = True,
    ) -> None:
        super().__init__()
        if lpips_weight < 0:
            raise UserError(f"loss.lpips_weight: {lpips_weight}: give 0 or more")
        if not 0 < lpips_share <= 1:
            raise UserError(f"loss.lpips_share: {lpips_share}: give a share in (0, 1]; lpips_weight 0 turns LPIPS off")
        self.pixel, self.lpips_weight, self.lpips_share = pixel, lpips_weight, lpips_share
        self.lpips = LPIPS(lpips_network) if lpips_weight > 0 else None
        self.log_scale = nn.Parameter(torch.zeros(())) if learned_variance else None

    def forward(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of reconstructions and images (B, 3, H, W), a scalar, and its detached parts (means per pixel) by name."""
        with torch.autocast(images.device.type, enabled=False):
            error = reconstructions.float() - images.float()
            distance = error.abs() if self.pixel == "l1" else error.square()
            parts: dict[str, Tensor] = {self.pixel: distance.detach().mean()}
            values = images[0].numel()
            total = distance.sum() / len(images)
            if self.lpips is not None:
                measured = math.ceil(self.lpips_share * len(images))
                perceptual = self.lpips(reconstructions[:measured].float(), images[:measured].float()).mean()
                parts["lpips"] = perceptual.detach()
                total = total + self.lpips_weight * values * perceptual
            if self.log_scale is not None:
                total = total / self.log_scale.exp() + values * self.log_scale
                parts["log_scale"] = self.log_scale.detach()
            return total, parts

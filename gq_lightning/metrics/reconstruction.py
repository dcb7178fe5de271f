"""ReconstructionMetrics: the metrics of images decoded from tokens, over all images and processes (arXiv 2512.06609, section 5)."""

import dataclasses
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection, SumMetric

from gq_lightning.metrics.base import Metric, Number
from gq_lightning.metrics.bits import Bits
from gq_lightning.metrics.codebook import CodebookUsage
from gq_lightning.metrics.lpips import LPIPS
from gq_lightning.metrics.ms_ssim import MSSSIM
from gq_lightning.metrics.psnr import PSNR
from gq_lightning.metrics.rate import Rate
from gq_lightning.metrics.rfid import RFID
from gq_lightning.metrics.ssim import SSIM
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer

# all metrics, in the order of the report
METRICS: list[type[Metric]] = [PSNR, SSIM, MSSSIM, LPIPS, RFID, Rate, Bits, CodebookUsage]
GAUSSIAN = "gaussian_"  # prefix of the metrics of images decoded from the Gaussian posterior
PACKAGES = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "lpips")


def numbers() -> dict[str, Number]:
    """Every number that metrics.json may contain, by name."""
    every = [number for metric in METRICS for number in metric.numbers]
    both = [number for metric in METRICS if metric.of_images for number in metric.numbers]
    every += [dataclasses.replace(number, name=GAUSSIAN + number.name, label=f"Gaussian {number.label}") for number in both]
    return {number.name: number for number in every}


class ReconstructionMetrics(nn.Module):
    """The metrics that apply to a quantizer: call `update` for each batch, then `compute`.

    It adds nothing to a state_dict and shares its networks within the process, so a LightningModule may hold this object. Raises UserError
    if weights are missing and cannot be fetched.

    Args:
        quantizer: of the tokens.
        costly: compute the costly metrics (rFID) of the images decoded from tokens.
        gaussian_costly: with `costly`, compute them for the Gaussian images too.
        gaussian: measure the images decoded from the Gaussian posterior, if there is one.
    """

    def __init__(self, quantizer: Quantizer, costly: bool = True, gaussian_costly: bool = True, gaussian: bool = True) -> None:
        super().__init__()

        def collection(every: list[type[Metric]], costly: bool, prefix: str | None = None) -> MetricCollection:
            chosen = [metric(quantizer) for metric in every if costly or not metric.costly]
            return MetricCollection(chosen, prefix=prefix, compute_groups=False)

        self.images = SumMetric()
        self.of_tokens = collection(METRICS, costly)
        has_gaussian = gaussian and isinstance(quantizer, PosteriorQuantizer)
        of_gaussian = [metric for metric in METRICS if metric.of_images] if has_gaussian else []
        self.of_gaussian = collection(of_gaussian, costly and gaussian_costly, GAUSSIAN)

    def update(self, images: Tensor, reconstructions: Tensor, tokens: Tensor, gaussian: Tensor | None, bits: Tensor | None) -> None:
        """Measures one batch, in float32 under any autocast. Raises UserError if a token is not in [0, codebook_size).

        Args:
            images: the originals, (B, 3, H, W) in [-1, 1]; like the others clamped here.
            reconstructions: decoded from the tokens, (B, 3, H, W).
            tokens: (B, h, w, tokens_per_position) int64.
            gaussian: decoded from the Gaussian posterior without quantisation, (B, 3, H, W); None if there is no posterior.
            bits: KL of each token in bits, (B, h, w, tokens_per_position), likewise.
        """
        self.images.update(len(images))
        if not len(images):
            return
        with torch.autocast(images.device.type, enabled=False):
            originals = to_255(images)
            self.of_tokens.update(originals=originals, images=to_255(reconstructions), tokens=tokens, bits=bits)
            if gaussian is not None:
                self.of_gaussian.update(originals=originals, images=to_255(gaussian))

    def compute(self) -> dict[str, float | int]:
        """The metrics over all images of all processes, as plain numbers by name, without those that could not be measured.

        Empty if there was no image.
        """
        self.images.update(0)
        with warnings.catch_warnings():
            # a process may have had no image
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
            return self.of_tokens.compute() | self.of_gaussian.compute() if self.images.compute() else {}

    def protocol(self) -> dict[str, Any]:
        """How the numbers are measured, for JSON."""
        result: dict[str, Any] = {"value_range": "[-1, 1], clamped; measured on 0..255"}
        for metric in self.of_tokens.values():
            result |= metric.protocol  # type: ignore[arg-type]
        return result | {"versions": {package.replace("-", "_"): version(package) for package in PACKAGES}}


def to_255(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to float32 on the scale 0..255."""
    return (images.float().clamp(-1, 1) + 1) * 127.5

"""ReconstructionMetrics: what a receiver of the tokens sees, measured over all images and processes (arXiv 2512.06609, section 5)."""

import math
from importlib.metadata import version
from typing import Any, Final, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from gq_lightning import weights
from gq_lightning.errors import UserError
from gq_lightning.metrics import frechet, similarity
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer
from gq_lightning.theory import bits_per_pixel, expected_usage
from gq_lightning.weights.lpips import LPIPS, SMALLEST_SIDE, TRUNKS

QUALITIES = ("psnr", "ssim", "ms_ssim", "lpips")
PREFIXES = ("", "gaussian_")  # decoded from the tokens, and from the Gaussian posterior
# a histogram of more codewords than this would cost more memory than it is worth
LARGEST_HISTOGRAM = 2**22
LPIPS_NETWORK: Final = "alex"


class ReconstructionMetrics(Metric):
    """Quality, rate and codebook usage. A torchmetrics `Metric`: call `update` per batch, on any device, then `compute`.

    All states are sums, minima or maxima that torchmetrics reduces over the processes, so uneven batches are weighted correctly. No
    state is in a state_dict, and the networks are shared by the whole process, so a LightningModule may hold this object.

    Args:
        codebook_size: tokens are integers in [0, codebook_size).
        bits_per_position: tokens_per_position * log2(codebook_size).
        tokens_per_position: tokens at each position of the grid.
        downsampling: pixels per position along one axis.
        image_size: pixels along a side, where known; needed only by `protocol` before the first batch.
        lpips, rfid: whether to measure them; both need pretrained weights.
        gaussian_rfid: whether to measure rFID of the Gaussian images, too, which doubles its cost.
        alpha: half the width, in bits, of the band around log2(codebook_size) of `share_within_alpha`.

    Raises:
        UserError: the bits do not fit the codebook, or weights are missing and cannot be fetched.
    """

    full_state_update = False
    histogram: Tensor
    bits: Tensor
    bits_min: Tensor
    bits_max: Tensor

    def __init__(
        self,
        codebook_size: int,
        bits_per_position: float,
        tokens_per_position: int,
        downsampling: int,
        image_size: int | None = None,
        lpips: bool = True,
        rfid: bool = True,
        alpha: float = 0.5,
        gaussian_rfid: bool = True,
    ) -> None:
        super().__init__()
        self.bits_per_token = math.log2(codebook_size)
        if not math.isclose(bits_per_position, tokens_per_position * self.bits_per_token, rel_tol=1e-6):
            raise UserError(
                f"bits_per_position {bits_per_position} does not fit {tokens_per_position} tokens of a codebook of {codebook_size}: "
                f"it must be {tokens_per_position * self.bits_per_token:g}"
            )
        self.codebook_size, self.bits_per_position, self.tokens_per_position = codebook_size, bits_per_position, tokens_per_position
        self.downsampling, self.image_size, self.alpha, self.rfid = downsampling, image_size, alpha, rfid
        self.perceptual = LPIPS(LPIPS_NETWORK) if lpips else None
        self._rfid_prefixes = tuple(prefix for prefix in PREFIXES if rfid and (gaussian_rfid or not prefix))
        if rfid:
            weights.load("inception")
        self._sides: set[int] = set()
        self._images_of_all_processes = 0

        for name in ("images", "pixels", "tokens"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        histogram = codebook_size if codebook_size <= LARGEST_HISTOGRAM else 0
        self.add_state("histogram", torch.zeros(histogram, dtype=torch.int64), dist_reduce_fx="sum")
        for prefix in PREFIXES:
            for quality in QUALITIES:  # number of images and sum of their values
                self.add_state(prefix + quality, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        # number of tokens, sum of bits - log2 K, sum of its squares, number within alpha
        self.add_state("bits", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bits_min", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("bits_max", torch.tensor(-math.inf), dist_reduce_fx="max")
        for features in ("original", *(f"{prefix}rfid" for prefix in self._rfid_prefixes)) if rfid else ():
            self.add_state(f"{features}_count", torch.tensor(0), dist_reduce_fx="sum")
            self.add_state(f"{features}_sum", torch.zeros(frechet.FEATURES, dtype=torch.float64), dist_reduce_fx="sum")
            products = torch.zeros(frechet.FEATURES, frechet.FEATURES, dtype=torch.float64)
            self.add_state(f"{features}_products", products, dist_reduce_fx="sum")

    @classmethod
    def of(cls, quantizer: Quantizer, downsampling: int, rfid: bool = True, gaussian_rfid: bool = True) -> Self:
        """The metrics that fit this quantizer: its geometry, and the alpha of its TDC."""
        tdc = quantizer.tdc if isinstance(quantizer, PosteriorQuantizer) else None
        return cls(
            codebook_size=quantizer.codebook_size,
            bits_per_position=quantizer.bits_per_position,
            tokens_per_position=quantizer.tokens_per_position,
            downsampling=downsampling,
            rfid=rfid,
            alpha=0.5 if tdc is None else tdc.alpha,
            gaussian_rfid=gaussian_rfid,
        )

    def update(
        self, images: Tensor, reconstructions: Tensor, tokens: Tensor, gaussian: Tensor | None = None, bits: Tensor | None = None
    ) -> None:
        """Measures one batch.

        Args:
            images: the originals, (B, 3, H, W) in [-1, 1].
            reconstructions: decoded from the tokens, (B, 3, H, W); clamped to [-1, 1] here, as the other images are.
            tokens: (B, h, w, tokens_per_position) int64.
            gaussian: decoded from the Gaussian posterior without quantisation, (B, 3, H, W).
            bits: KL of each token in bits, (B, h, w, tokens_per_position).

        Raises:
            UserError: a token is not in [0, codebook_size).
        """
        if images.device != self.device:
            self.to(images.device)
        self._sides.add(min(images.shape[-2:]))
        originals = _to_255(images)
        self._add("images", images.shape[0])
        self._add("pixels", images.shape[0] * images.shape[-2] * images.shape[-1])
        self._add_tokens(tokens)
        if bits is not None:
            self._add_bits(bits)
        if self.rfid:
            self._add_features("original", originals, cached=True)
        for prefix, candidates in zip(PREFIXES, (reconstructions, gaussian), strict=True):
            if candidates is not None:
                self._add_quality(prefix, originals, _to_255(candidates))

    def compute(self) -> dict[str, float | int]:
        """The metrics of all images of all processes, as plain numbers by name; what was not or cannot be measured is left out."""
        result: dict[str, float | int] = {}
        for prefix in PREFIXES:
            for quality in QUALITIES:
                count, total = getattr(self, prefix + quality).tolist()
                if count:
                    result[prefix + quality] = total / count
            if prefix in self._rfid_prefixes and self._count(f"{prefix}rfid") >= 2:
                result[f"{prefix}rfid"] = frechet.frechet_distance(self._features("original"), self._features(f"{prefix}rfid"))
        images, pixels, tokens = self._count("images"), self._count("pixels"), self._count("tokens")
        if pixels:
            result["bits_per_pixel"] = tokens / self.tokens_per_position * self.bits_per_position / pixels
        if tokens and len(self.histogram):
            shares = self.histogram[self.histogram > 0].double() / tokens
            result["codebook_usage"] = len(shares) / self.codebook_size
            result["codebook_usage_expected"] = expected_usage(self.codebook_size, tokens)
            result["codebook_perplexity"] = math.exp(-(shares * shares.log()).sum().item())
        count, deviation, squares, within = self.bits.tolist()
        if count:
            mean = deviation / count
            result["bits_min"], result["bits_mean"] = self.bits_min.item(), self.bits_per_token + mean
            result["bits_max"], result["bits_std"] = self.bits_max.item(), math.sqrt(max(squares / count - mean**2, 0))
            result["share_within_alpha"] = within / count
        self._images_of_all_processes = images
        return {**result, "images": images, "tokens": tokens}

    def reset(self) -> None:
        """Forgets all batches."""
        super().reset()
        self._sides = set()
        self._images_of_all_processes = 0

    def protocol(self) -> dict[str, Any]:
        """How the numbers were measured, for JSON. Ask after `compute`: MS-SSIM's levels and the notes depend on the images."""
        sides = self._sides or ({self.image_size} if self.image_size else set())
        levels = sorted({similarity.ms_ssim_levels(side) for side in sides})
        smallest = min(sides, default=None)
        window = f"Gaussian window {similarity.WINDOW}, sigma {similarity.SIGMA}, inside the image only, data range 255, mean of RGB"
        result: dict[str, Any] = {
            "value_range": "[-1, 1], clamped; measured on 0..255",
            "psnr": f"per image over all channels, then the mean; 0..255, not rounded; at most {similarity.PSNR_CAP:g} dB",
            "ssim": window,
            "ms_ssim": window + "; Wang's weights of the levels used, made to sum to 1",
            "ms_ssim_levels": levels[0] if len(levels) == 1 else levels,
            "bits_per_pixel_of_the_grid": bits_per_pixel(self.bits_per_position, self.downsampling),
        }
        if smallest is not None and 0 in levels:
            result["ms_ssim_note"] = f"left out for images under 21 pixels: two levels do not fit (smallest: {smallest})"
        if self.perceptual is not None:
            result |= {"lpips_network": LPIPS_NETWORK, "lpips_weights_sha256": weights.checksum(TRUNKS[LPIPS_NETWORK])}
            if smallest is not None and smallest < SMALLEST_SIDE[LPIPS_NETWORK]:
                result["lpips_note"] = f"left out for images under {SMALLEST_SIDE[LPIPS_NETWORK]} pixels (smallest: {smallest})"
        if self.rfid:
            result["rfid_extractor"] = "torch-fidelity's Inception of 2015 (TensorFlow's bilinear resize to 299), images rounded to 8 bits"
            result |= {"rfid_features": frechet.FEATURES, "rfid_weights_sha256": weights.checksum("inception")}
            result |= self._rfid_note()
        if not len(self.histogram):
            result["codebook_note"] = f"usage is not measured for more than {LARGEST_HISTOGRAM} codewords"
        packages = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "lpips")
        return {**result, "versions": {package.replace("-", "_"): version(package) for package in packages}}

    def _rfid_note(self) -> dict[str, str]:
        images = self._images_of_all_processes
        if images < 2:
            return {"rfid_note": f"left out: {images} images have no covariance, 2 are the least"}
        if images <= frechet.FEATURES:
            return {
                "rfid_note": f"{images} images for {frechet.FEATURES} features: the covariance is singular and the distance depends on the "
                "number of images; compare it only with values from the same images"
            }
        return {}

    def _add(self, state: str, amount: Any) -> None:
        # not in place: a state may be an inference tensor although inference mode is off now, or the reverse
        setattr(self, state, getattr(self, state) + amount)

    def _count(self, state: str) -> int:
        name = state if state in ("images", "pixels", "tokens") else f"{state}_count"
        return int(getattr(self, name).item())

    def _add_tokens(self, tokens: Tensor) -> None:
        self._add("tokens", tokens.numel())
        if tokens.numel() and len(self.histogram):
            lowest, highest = (int(value) for value in tokens.aminmax())
            if lowest < 0 or highest >= self.codebook_size:
                raise UserError(f"tokens from {lowest} to {highest}: this codebook has tokens from 0 to {self.codebook_size - 1}")
            self._add("histogram", torch.bincount(tokens.flatten(), minlength=self.codebook_size))

    def _add_bits(self, bits: Tensor) -> None:
        deviation = bits.double().flatten() - self.bits_per_token
        within = (deviation.abs() <= self.alpha).sum()
        sums = (deviation.new_tensor(deviation.numel()), deviation.sum(), deviation.square().sum(), within.double())
        self._add("bits", torch.stack(sums))
        self.bits_min = torch.minimum(self.bits_min, bits.min().float())
        self.bits_max = torch.maximum(self.bits_max, bits.max().float())

    def _add_quality(self, prefix: str, originals: Tensor, candidates: Tensor) -> None:
        side = min(originals.shape[-2:])
        values = {"psnr": similarity.psnr(candidates, originals)}
        if side >= similarity.WINDOW:
            values["ssim"] = similarity.ssim(candidates, originals)
        if levels := similarity.ms_ssim_levels(side):
            values["ms_ssim"] = similarity.ms_ssim(candidates, originals, levels)
        if self.perceptual is not None and side >= SMALLEST_SIDE[LPIPS_NETWORK]:
            values["lpips"] = self.perceptual(candidates / 127.5 - 1, originals / 127.5 - 1)
        for name, value in values.items():
            value = value.double()
            self._add(prefix + name, torch.stack([value.new_tensor(len(value)), value.sum()]))
        if prefix in self._rfid_prefixes:
            self._add_features(f"{prefix}rfid", candidates)

    def _add_features(self, name: str, images: Tensor, cached: bool = False) -> None:
        features = frechet.inception_features(images, cached)
        self._add(f"{name}_count", len(features))
        self._add(f"{name}_sum", features.sum(dim=0))
        self._add(f"{name}_products", features.T @ features)

    def _features(self, name: str) -> tuple[int, Tensor, Tensor]:
        return self._count(name), getattr(self, f"{name}_sum"), getattr(self, f"{name}_products")


def _to_255(images: Tensor) -> Tensor:
    return (images.float().clamp(-1, 1) + 1) * 127.5

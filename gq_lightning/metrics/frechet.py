"""The Fréchet distance of Inception features (FID, https://arxiv.org/abs/1706.08500), with torch-fidelity's Inception of 2015."""

from functools import cache
from io import BytesIO

import numpy
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from gq_lightning import weights
from gq_lightning.metrics import feature_cache

FEATURES = 2048


def inception_features(images: Tensor, cached: bool = False) -> Tensor:
    """Features (B, 2048), float64, of images (B, 3, H, W) on the scale 0..255, which are first rounded to whole numbers.

    Args:
        cached: use the cache (feature_cache.py); for originals, which every evaluation measures again.
    """

    def compute(pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            return _extractor(pixels.device)(pixels.contiguous(memory_format=torch.channels_last))[0]

    pixels = images.round().to(torch.uint8)
    return (feature_cache.remembered(pixels, compute) if cached else compute(pixels)).double()


@cache
def _extractor(device: torch.device) -> nn.Module:
    state = weights.load("inception")
    # the classifier is unused and missing from the cached weights
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, FEATURES), torch.zeros(1008)
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    # the module must not hold inference tensors, and its random initialisation must not change a training's random numbers
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return faster(FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=file)).to(device)


def faster(extractor: nn.Module) -> nn.Module:
    """Folds each batch norm into its convolution and lays weights out channels-last: two thirds of the time, features within 1e-5."""
    for block in extractor.modules():
        if isinstance(block, BasicConv2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return extractor.to(memory_format=torch.channels_last)


def frechet_distance(first: tuple[int, Tensor, Tensor], second: tuple[int, Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1 C2)^(1/2) of two sets of vectors.

    With factors C = F F^T, the last trace is the sum of the singular values of F1^T F2. This is exact even if a covariance is singular
    (fewer vectors than features), and many times faster than the eigenvalues of C1 C2.

    Args:
        first, second: (number of vectors >= 2, their sum (D,), the sum of their outer products (D, D)), float64.

    Returns:
        The distance, >= 0; nan if a sum is not finite.
    """
    mean1, covariance1 = _moments(*first)
    mean2, covariance2 = _moments(*second)
    if not (numpy.isfinite(covariance1).all() and numpy.isfinite(covariance2).all()):
        return float("nan")
    cross = scipy.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(float(distance), 0.0)  # for equal sets, rounding may give a tiny negative number


def _moments(count: int, total: Tensor, products: Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    mean = total / count
    return mean.cpu().numpy(), ((products - count * torch.outer(mean, mean)) / (count - 1)).cpu().numpy()


def _factor(covariance: numpy.ndarray) -> numpy.ndarray:
    """F (D, rank) with F F^T = covariance, by a pivoted Cholesky decomposition."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    factor = numpy.empty((len(covariance), rank))
    factor[pivots - 1] = numpy.tril(lower)[:, :rank]
    return factor

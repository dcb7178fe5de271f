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
SPATIAL = 7 * 17 * 17  # of sFID
Moments = tuple[numpy.ndarray, numpy.ndarray]  # mean (D,) and covariance (D, D), float64


def inception_features(images: Tensor, cached: bool = False) -> Tensor:
    """Features (B, 2048), float64, of images (B, 3, H, W) on the scale 0..255, which are first rounded to whole numbers.

    Args:
        cached: use the cache (feature_cache.py); for originals, which every evaluation measures again.
    """

    pixels = images.round().to(torch.uint8)
    return (feature_cache.remembered(pixels, _pooled) if cached else _pooled(pixels)).double()


def spatial_features(images: Tensor, cached: bool = False) -> tuple[Tensor, Tensor]:
    """`inception_features`, and those of sFID (B, 2023): the first 7 channels of mixed_6/conv, with a row's columns and channels together,
    as in ADM (https://arxiv.org/abs/2103.03841, https://arxiv.org/abs/2105.05233)."""
    pixels = images.round().to(torch.uint8)
    both = feature_cache.remembered(pixels, _pooled_and_spatial, "-spatial") if cached else _pooled_and_spatial(pixels)
    pooled, spatial = both.double().split([FEATURES, SPATIAL], dim=1)
    return pooled, spatial


def _pooled(pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, enabled=False):
        return _extractor(pixels.device)(pixels.contiguous(memory_format=torch.channels_last))[0]


def _pooled_and_spatial(pixels: Tensor) -> Tensor:
    taken: list[Tensor] = []
    layer = _extractor(pixels.device).get_submodule("Mixed_6d.branch1x1")
    hook = layer.register_forward_hook(lambda module, given, output: taken.append(output[:, :7].permute(0, 2, 3, 1).flatten(1)))
    try:
        return torch.cat([_pooled(pixels), *taken], dim=1)
    finally:
        hook.remove()


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
    """The distance of two sets of vectors.

    Args:
        first, second: (number of vectors >= 2, their sum (D,), the sum of their outer products (D, D)), float64.

    Returns:
        The distance, >= 0; nan if a sum is not finite.
    """
    return distance(moments(*first), moments(*second))


def distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1 C2)^(1/2), >= 0; nan if a covariance is not finite.

    With factors C = F F^T, the last trace is the sum of the singular values of F1^T F2. This is exact even if a covariance is singular
    (fewer vectors than features), and many times faster than the eigenvalues of C1 C2.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    if not (numpy.isfinite(covariance1).all() and numpy.isfinite(covariance2).all()):
        return float("nan")
    cross = scipy.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    found = ((mean1 - mean2) ** 2).sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(float(found), 0.0)  # for equal sets, rounding may give a tiny negative number


def moments(count: int, total: Tensor, products: Tensor) -> Moments:
    """Mean and covariance of vectors, from their number, their sum and the sum of their outer products."""
    mean = total / count
    return mean.cpu().numpy(), ((products - count * torch.outer(mean, mean)) / (count - 1)).cpu().numpy()


def _factor(covariance: numpy.ndarray) -> numpy.ndarray:
    """F (D, rank) with F F^T = covariance, by a pivoted Cholesky decomposition."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    factor = numpy.empty((len(covariance), rank))
    factor[pivots - 1] = numpy.tril(lower)[:, :rank]
    return factor

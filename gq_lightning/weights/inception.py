"""torch-fidelity's Inception of 2015: the features of FID, and those of sFID."""

from functools import cache
from io import BytesIO

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from gq_lightning import weights
from gq_lightning.weights import feature_cache

FEATURES = 2048
SPATIAL = 7 * 17 * 17  # of sFID


def inception_features(images: Tensor, cached: bool = False) -> Tensor:
    """Features (B, 2048), float64, of images (B, 3, H, W) on the scale 0..255, which are first rounded to whole numbers. `cached` uses the
    cache (feature_cache.py); for originals, which every evaluation measures again."""
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

"""Small real tokenizers for the tests."""

from pathlib import Path

import torch

from gq_lightning import ImageTokenizer
from gq_lightning.backbones import UNet, VisionTransformer
from gq_lightning.losses import ReconstructionLoss
from gq_lightning.quantizers import GaussianQuantizer

CONFIGS = Path(__file__).parents[1] / "configs"


def small_tokenizer(backbone: str, **arguments: object) -> ImageTokenizer:
    torch.manual_seed(0)
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256)
    widths = {"encoder_channels": quantizer.encoder_channels, "latent_channels": quantizer.latent_channels, "image_size": 32}
    network = (
        VisionTransformer(**widths, width=32, layers=1, heads=2, head_width=64)
        if backbone == "vit"
        else UNet(**widths, channels=32, multipliers=[1, 1, 1, 1], blocks=1, attention_resolutions=[4])
    )
    loss = ReconstructionLoss("l2", lpips_weight=0.0)
    return ImageTokenizer(network, quantizer, loss, **arguments)  # type: ignore[arg-type]

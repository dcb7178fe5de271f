"""Backbones: the networks between images and the grid of features and latents."""

from gq_lightning.backbones.base import Backbone
from gq_lightning.backbones.diffusers import DiffusersKL, DiffusersTiny
from gq_lightning.backbones.unet import UNet
from gq_lightning.backbones.vit import VisionTransformer

__all__ = ["Backbone", "DiffusersKL", "DiffusersTiny", "UNet", "VisionTransformer"]

"""Backbone: an encoder from images to features and a decoder from latents to images.

images (B, 3, H, W) --encode--> features (B, encoder_channels, h, w)
latents (B, latent_channels, h, w) --decode--> images (B, 3, H, W),     h = H / downsampling
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gq_lightning.construction import Recorded, Size, sides
from gq_lightning.errors import UserError


class Backbone(Recorded, nn.Module, ABC):
    """The contract of every backbone. The subclass sets the attributes. Its constructor takes plain values with type annotations, as
    `construction.build` wants them. All its tensors are in its state_dict: a saved backbone is built on the meta device, without values,
    and takes them from the file, so a non-persistent buffer would stay empty.

    Attributes:
        encoder: images to features; a separate module, so that `backbone.encoder.requires_grad_(False)` freezes it.
        decoder: latents to images.
        encoder_channels: channels of the features that the quantizer takes.
        latent_channels: channels of the latents that the quantizer returns.
        downsampling: pixels per position along one axis.
        fixed_image_size: the only image size (pixels; an int, or height and width) that `encode` and `decode` accept, or None if any
            multiple of `downsampling` works.
    """

    encoder: nn.Module
    decoder: nn.Module
    encoder_channels: int
    latent_channels: int
    downsampling: int
    fixed_image_size: Size | None

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to features (B, encoder_channels, H / downsampling, W / downsampling)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, latent_channels, h, w) to images (B, 3, h * downsampling, w * downsampling), not clamped."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last layer, at which the adaptive adversarial weight is computed."""


def apply_block(block: nn.Module, inputs: Tensor, gradient_checkpointing: bool) -> Tensor:
    """`block(inputs)`; with `gradient_checkpointing` the backward pass recomputes its activations instead of keeping them."""
    if gradient_checkpointing and torch.is_grad_enabled():
        # the blocks use no random numbers, so there is no generator state to save
        return checkpoint(block, inputs, use_reentrant=False, preserve_rng_state=False)
    return block(inputs)


def check_multiple(size: Size, downsampling: int) -> None:
    """Raises UserError, with the nearest sizes that fit, unless both sides are positive multiples of `downsampling`."""
    for name, side in zip(("height", "width"), sides(size), strict=True):
        if side < downsampling or side % downsampling:
            lower = max(side // downsampling, 1) * downsampling
            raise UserError(
                f"image {name} {side} is not a multiple of {downsampling}, the backbone's downsampling: "
                f"use {lower} or {lower + downsampling}, or let `encode` pad the picture (--fit pad)"
            )

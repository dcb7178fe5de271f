"""VisionTransformer: the transformer autoencoder of BSQ-ViT, https://arxiv.org/abs/2406.07548 (Zhao et al. 2024).

image -> patches -> linear -> transformer -> linear -> features (a map; only this file handles sequences)
latents -> linear -> transformer -> linear, tanh, linear -> patches -> image
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_lightning.backbones.base import Backbone, apply_block, check_multiple
from gq_lightning.construction import Size, check_cost, shortened, sides
from gq_lightning.errors import UserError


def to_sequence(grid: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h * w, C)."""
    return grid.flatten(2).transpose(1, 2)


def to_map(sequence: Tensor, height: int) -> Tensor:
    """(B, height * w, C) to (B, C, height, w)."""
    return sequence.transpose(1, 2).unflatten(2, (height, -1))


class Transformer(nn.Module):
    """Learned position embedding, LayerNorm, pre-norm blocks, LayerNorm. (B, positions, width) to the same shape."""

    def __init__(self, positions: int, width: int, layers: int, heads: int, mlp_ratio: float, gradient_checkpointing: bool) -> None:
        from timm.models.vision_transformer import Block  # imported late: slow, and a UNet does not need it

        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(positions, width))
        if not self.position_embedding.is_meta:  # drawing on the meta device would import half of torch's compiler
            nn.init.normal_(self.position_embedding, std=width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, sequence: Tensor) -> Tensor:
        x = self.norm_in(sequence + self.position_embedding)
        for block in self.blocks:
            x = apply_block(block, x, self.gradient_checkpointing)
        return self.norm_out(x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, features, h, w)."""

    def __init__(self, features: int, patch_size: int, width: int, transformer: Transformer) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear_in = nn.Linear(3 * patch_size**2, width, bias=False)
        self.transformer = transformer
        self.linear_out = nn.Linear(width, features)

    def forward(self, images: Tensor) -> Tensor:
        # (B, h * w, 3 * patch_size**2), each patch in the order channel, row, column
        patches = to_sequence(F.pixel_unshuffle(images, self.patch_size))
        x = self.transformer(self.linear_in(patches))
        return to_map(self.linear_out(x), images.shape[2] // self.patch_size)


class Decoder(nn.Module):
    """Latents (B, latents, h, w) to images (B, 3, H, W)."""

    def __init__(self, latents: int, patch_size: int, width: int, head_width: int, transformer: Transformer) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear_in = nn.Linear(latents, width)
        self.transformer = transformer
        self.head = nn.Linear(width, head_width)
        self.linear_out = nn.Linear(head_width, 3 * patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.transformer(self.linear_in(to_sequence(latents)))
        patches = self.linear_out(torch.tanh(self.head(x)))
        return F.pixel_shuffle(to_map(patches, latents.shape[2]), self.patch_size)


class VisionTransformer(Backbone):
    """Transformers over patches. The defaults are the Gaussian Quant paper's (section 5), with 174.83 M parameters.

    The position embedding is learned for one image size, `fixed_image_size`. The tokenizer handles larger images in windows.

    Args:
        encoder_channels: channels of the features, from the quantizer.
        latent_channels: channels of the latents, from the quantizer.
        image_size: of the images in pixels, an int for squares or (height, width), multiples of `patch_size`.
        patch_size: side of a patch in pixels; equals the downsampling.
        width: width of the transformers.
        layers: blocks of the encoder, and of the decoder.
        heads: attention heads; must divide `width`.
        mlp_ratio: hidden width of the blocks' MLP in units of `width`.
        head_width: hidden width of the decoder's final tanh layer.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: `heads` does not divide `width`, `image_size` is not a multiple of `patch_size`, or the network is too large (see
            `check_cost`). `encode` and `decode` raise it for inputs of another size.
    """

    training_arguments = frozenset({"gradient_checkpointing"})

    def __init__(
        self,
        encoder_channels: int,
        latent_channels: int,
        image_size: Size = 256,
        patch_size: int = 8,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        head_width: int = 3072,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "width": width, "layers": layers, "mlp_ratio": mlp_ratio, "head_width": head_width}
        # position embedding, the patches' two layers, attention and MLP of the blocks, in encoder and decoder
        rows, columns = (side / max(patch_size, 1) for side in sides(image_size))
        weights = 2 * width * (rows * columns + encoder_channels + latent_channels + 3 * patch_size**2)
        weights += 4 * layers * width**2 * (2 + mlp_ratio) + head_width * (width + 3 * patch_size**2)
        check_cost("VisionTransformer", 2 * layers, weights, encoder_channels=encoder_channels, latent_channels=latent_channels, **sizes)
        if heads < 1 or width % heads:
            raise UserError(f"VisionTransformer: width {width} is not a multiple of heads {heads}: change either so that it is")
        check_multiple(image_size, patch_size)
        self.encoder_channels = encoder_channels
        self.latent_channels = latent_channels
        self.downsampling = patch_size
        self.fixed_image_size = self.init_args["image_size"] = shortened(image_size)
        self.grid = (int(rows), int(columns))
        geometry = (self.grid[0] * self.grid[1], width, layers, heads, mlp_ratio, gradient_checkpointing)
        self.encoder: Encoder = Encoder(encoder_channels, patch_size, width, Transformer(*geometry))
        self.decoder: Decoder = Decoder(latent_channels, patch_size, width, head_width, Transformer(*geometry))

    def encode(self, images: Tensor) -> Tensor:
        self._check_size("image", images, self.downsampling)
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        self._check_size("map of latents", latents, 1)
        return self.decoder(latents)

    def _check_size(self, what: str, given: Tensor, scale: int) -> None:
        size, wanted = tuple(given.shape[-2:]), tuple(side * scale for side in self.grid)
        if size != wanted:
            raise UserError(
                f"VisionTransformer: {what} is {size[0]}x{size[1]}, not {wanted[0]}x{wanted[1]}: "
                f"resize it, set image_size, or use the tokenizer, which cuts images into windows"
            )

    @property
    def last_layer(self) -> nn.Parameter:
        return cast(nn.Parameter, self.decoder.linear_out.weight)

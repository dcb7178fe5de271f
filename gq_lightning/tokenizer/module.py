"""ImageTokenizer: what a user of tokens holds.

    images (B,3,H,W) --backbone.encode--> features (B,C,h,w) --quantizer--> latents (B,D,h,w) --backbone.decode--> images
                                                     tokenize |  ^ detokenize
                                                              v  |
                                                      tokens (B,h,w,n) int64

It knows contracts alone, no backbone or quantizer by name, and nothing of training.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gq_lightning.backbones.base import Backbone, check_multiple
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer
from gq_lightning.tokenizer.pretrained import FLOATS, Pretrained
from gq_lightning.tokenizer.refining import CANDIDATES, Distance, squared_error
from gq_lightning.tokenizer.refining import refine as refined
from gq_lightning.tokenizer.windows import see_in_windows

# beyond [-1, 1], for what resizing in half precision leaves
ROUNDING = 0.01


@dataclass(frozen=True)
class Reconstruction:
    """What evaluation looks at; images are clamped to [-1, 1].

    Attributes:
        tokens: (B, h, w, n) int64.
        images: (B, 3, H, W), decoded from the tokens alone.
        gaussian: (B, 3, H, W), decoded from the posterior mean, or None where the quantizer has no posterior.
        bits: (B, h, w, n), divergence of each token in bits, or None likewise.
    """

    tokens: Tensor
    images: Tensor
    gaussian: Tensor | None
    bits: Tensor | None


class ImageTokenizer(Pretrained):
    """Turns images into discrete tokens and back.

    It may be moved to any device and floating-point type. The quantizer works in float32 whatever the type of the backbone, so that
    codebooks and the search for codewords are the same; features of bfloat16 are other features, and may give other tokens.

    Args:
        backbone: encoder and decoder.
        quantizer: features to tokens and back.
    """

    def __init__(self, backbone: Backbone, quantizer: Quantizer) -> None:
        super().__init__()
        self.backbone = backbone
        self.attach(quantizer)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        deterministic: bool = False,
        tile: int | None = None,
        refine: int = 0,
        distance: Distance | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of `downsampling`, to tokens (B, h, w, n) int64.

        A picture that the backbone cannot see at once is seen in overlapping windows: of the backbone's `fixed_image_size`, or of
        `tile` pixels where memory is short. The tokens come in the picture's own grid all the same.

        Args:
            images: (B, 3, H, W).
            deterministic: process one image at a time, so that its tokens do not depend on the batch it is in. Otherwise the
                batch size may decide, by rounding, between two codewords that fit equally well.
            tile: side of the largest square seen at once, in pixels, a multiple of `downsampling`.
            refine: passes over the tokens that choose each through the decoder, see `refining`; a pass decodes every picture dozens to
                hundreds of times. The decoded picture is never further from the image than without.
            distance: what `refine` makes small: images (b, 3, a, c) in [-1, 1] and their originals to (b,); None is the squared error.

        Raises:
            UserError: the shape does not fit, a value lies outside [-1, 1] by more than rounding, the encoder gives values that are not
                finite, or the quantizer has no candidates for `refine`.
        """
        lowest, highest = check_images(images)
        if lowest >= 0 and highest > 0:
            warnings.warn("images hold nothing below 0: where they are in [0, 1], give images * 2 - 1", stacklevel=2)
        check_multiple(images.shape[2], images.shape[3], self.downsampling)
        if deterministic and len(images) > 1:
            return torch.cat([self.encode(image, False, tile, refine, distance) for image in images.split(1)])
        if refine < 0:
            raise UserError(f"refine: {refine} passes: give 0 or more")
        images = images.to(self.device, self.dtype)
        features = see_in_windows(self.backbone.encode, images, self.downsampling, 1, self.fixed_image_size, tile)
        self._check_finite(features, "features")
        features = features.movedim(1, -1)
        tokens = self.quantizer.tokenize(features)
        if not refine:
            return tokens
        candidates = self.quantizer.candidates(features, min(CANDIDATES, self.codebook_size))
        candidates[..., 0] = tokens
        return refined(lambda trials: self.decode(trials, tile).float(), images.float(), candidates, refine, distance or squared_error)[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor:
        """Tokens (B, h, w, n), of any integer type, to images (B, 3, h * downsampling, w * downsampling) in [-1, 1]; `tile` as in `encode`.

        Raises:
            UserError: the tokens are none of this tokenizer, or the decoder gives values that are not finite.
        """
        if tokens.ndim != 4:
            raise UserError(f"tokens must be (B, h, w, {self.tokens_per_position}), not {tuple(tokens.shape)}")
        latents = self.quantizer.detokenize(tokens.to(self.device)).movedim(-1, 1).to(self.dtype)
        images = see_in_windows(self.backbone.decode, latents, 1, self.downsampling, self.fixed_image_size, tile)
        self._check_finite(images, "images")
        return images.clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Reconstruction:
        """Images (B, 3, H, W) in [-1, 1], of a size that the backbone sees at once, through tokens and through the posterior mean."""
        check_images(images)
        features = self.backbone.encode(images.to(self.device, self.dtype)).movedim(1, -1)
        tokens = self.quantizer.tokenize(features)
        gaussian = bits = None
        if isinstance(self.quantizer, PosteriorQuantizer):
            posterior = self.quantizer.posterior(features)
            gaussian = self.backbone.decode(posterior.mean.movedim(-1, 1).to(self.dtype)).float().clamp(-1, 1)
            bits = posterior.bits
        return Reconstruction(tokens, self.decode(tokens).float(), gaussian, bits)

    def _check_finite(self, values: Tensor, what: str) -> None:
        if not values.is_meta and not bool(values.isfinite().all()):
            cure = "use float32 or bfloat16" if self.dtype == torch.float16 else "its weights are damaged, or the training diverged"
            raise UserError(f"the tokenizer gives {what} that are not finite: {cure}")

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.backbone.last_layer.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the backbone."""
        return self.backbone.last_layer.dtype

    @property
    def downsampling(self) -> int:
        """Pixels per position of the token grid, along one axis."""
        return self.backbone.downsampling

    @property
    def fixed_image_size(self) -> int | None:
        """The smallest picture (pixels) that `encode` accepts, where the backbone has one fixed size."""
        return self.backbone.fixed_image_size

    @property
    def codebook_size(self) -> int:
        """Tokens are in [0, codebook_size)."""
        return self.quantizer.codebook_size

    @property
    def tokens_per_position(self) -> int:
        """n of (B, h, w, n)."""
        return self.quantizer.tokens_per_position

    # Conversion

    def coarser(self, bits: int) -> "ImageTokenizer":
        """The same tokenizer with tokens of `bits` bits, the first ones of its own, where its codebook is a tree; weights are shared."""
        return ImageTokenizer(self.backbone, self.quantizer.coarser(bits))

    def attach(self, quantizer: Quantizer) -> None:
        """Replaces the quantizer, by one of the same widths."""
        for name in ("encoder_channels", "latent_channels"):
            wanted, given = getattr(self.backbone, name), getattr(quantizer, name)
            if wanted != given:
                raise UserError(f"quantizer: its {name} are {given}, the backbone's are {wanted}: configure both alike")
        self.quantizer = quantizer

    def freeze_encoder(self) -> None:
        """From here on the encoder, and with it every token, stays as it is."""
        self.backbone.encoder.requires_grad_(False).eval()


def check_images(images: Tensor) -> tuple[float, float]:
    """The least and the largest value of images.

    Raises:
        UserError: they are not floating point (B, 3, H, W), or hold a value outside [-1, 1] by more than rounding, or NaN.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in FLOATS:
        raise UserError(f"images must be floating point (B, 3, H, W) in [-1, 1], not {images.dtype} {tuple(images.shape)}")
    if images.is_meta or not images.numel():
        return -1.0, 1.0
    lowest, highest = (float(value) for value in images.aminmax())
    if not (lowest >= -1 - ROUNDING and highest <= 1 + ROUNDING):
        hint = "they seem to be in [0, 255]: give images / 127.5 - 1" if 0 <= lowest <= highest <= 255 else "bring them there first"
        raise UserError(f"images must be in [-1, 1], not from {lowest:g} to {highest:g}: {hint}")
    return lowest, highest

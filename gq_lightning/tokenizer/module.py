"""ImageTokenizer: images to tokens and back.

    images (B,3,H,W) --backbone.encode--> features (B,C,h,w) --quantizer--> latents (B,D,h,w) --backbone.decode--> images
                                                     tokenize |  ^ detokenize
                                                              v  |
                                                      tokens (B,h,w,n) int64

It depends on the abstract Backbone and Quantizer only, and on no training code.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gq_lightning.backbones.base import Backbone, check_multiple
from gq_lightning.construction import Size
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer, has_values
from gq_lightning.tokenizer.pretrained import FLOATS, Pretrained
from gq_lightning.tokenizer.refining import CANDIDATES, Distance, squared_error
from gq_lightning.tokenizer.refining import refine as refined
from gq_lightning.tokenizer.windows import see_in_windows

# tolerance around [-1, 1], for images resized in half precision
ROUNDING = 0.01


@dataclass(frozen=True)
class Reconstruction:
    """The result of `reconstruct`, for evaluation: `tokens` (B, h, w, n) int64, and `images` (B, 3, H, W) decoded from them, clamped to
    [-1, 1].

    Of a quantizer with posteriors also `gaussian` (B, 3, H, W), decoded from the posterior mean, and `bits` (B, h, w, n), the divergence of
    each token; else None.
    """

    tokens: Tensor
    images: Tensor
    gaussian: Tensor | None
    bits: Tensor | None


class ImageTokenizer(Pretrained):
    """Turns images into discrete tokens and back.

    It can be moved to any device and floating-point type. The quantizer works in float32 whatever the type of the backbone, so the
    codebook and the search for codewords do not change. A bfloat16 encoder gives different features, and may give different tokens.

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

        Images larger than the backbone's `fixed_image_size`, or than `tile` if memory is short, are encoded in overlapping windows. The
        tokens still form the grid of the whole image.

        Args:
            images: (B, 3, H, W).
            deterministic: process one image at a time, so that its tokens do not depend on the rest of the batch. Otherwise rounding,
                which depends on the batch size, may decide between two codewords that fit equally well.
            tile: side of the largest square processed at once, in pixels, a multiple of `downsampling`.
            refine: number of passes that choose each token by decoding it, see `refining`. A pass decodes every image dozens to
                hundreds of times. The decoded image never gets further from the original than without refinement.
            distance: the distance that `refine` minimises, from images (b, 3, a, c) in [-1, 1] and their originals to (b,); None is the
                squared error.

        Raises:
            UserError: the shape does not fit, a value is outside [-1, 1] by more than rounding, the encoder's output is not finite, or
                the quantizer has no candidates for `refine`.
        """
        lowest, highest = check_images(images)
        if lowest >= 0 and highest > 0:
            warnings.warn("images have no value below 0: if they are in [0, 1], give images * 2 - 1", stacklevel=2)
        check_multiple((images.shape[2], images.shape[3]), self.downsampling)
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
            UserError: the tokens do not fit this tokenizer, or the decoder's output is not finite.
        """
        if tokens.ndim != 4:
            raise UserError(f"tokens must be (B, h, w, {self.tokens_per_position}), not {tuple(tokens.shape)}")
        latents = self.quantizer.detokenize(tokens.to(self.device)).movedim(-1, 1).to(self.dtype)
        images = see_in_windows(self.backbone.decode, latents, 1, self.downsampling, self.fixed_image_size, tile)
        self._check_finite(images, "images")
        return images.clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, tile: int | None = None, gaussian: bool = True) -> Reconstruction:
        """Images (B, 3, H, W) in [-1, 1], decoded from tokens and, if there is one and unless `gaussian` is False, from the posterior mean,
        which doubles the decoder's time. With `tile`, larger images are seen in windows, see `encode`."""
        check_images(images)
        images = images.to(self.device, self.dtype)
        features = see_in_windows(self.backbone.encode, images, self.downsampling, 1, self.fixed_image_size, tile).movedim(1, -1)
        tokens = self.quantizer.tokenize(features)
        images_of_mean = bits = None
        if isinstance(self.quantizer, PosteriorQuantizer):
            posterior = self.quantizer.posterior(features)
            bits = posterior.bits
            if gaussian:
                mean = posterior.mean.movedim(-1, 1).to(self.dtype)
                decoded = see_in_windows(self.backbone.decode, mean, 1, self.downsampling, self.fixed_image_size, tile)
                images_of_mean = decoded.float().clamp(-1, 1)
        return Reconstruction(tokens, self.decode(tokens, tile).float(), images_of_mean, bits)

    def _check_finite(self, values: Tensor, what: str) -> None:
        if has_values(values) and not bool(values.isfinite().all()):
            cure = "use float32 or bfloat16" if self.dtype == torch.float16 else "its weights are damaged, or the training diverged"
            raise UserError(f"the tokenizer's {what} are not finite: {cure}")

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
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
    def fixed_image_size(self) -> Size | None:
        """Size of the smallest image (pixels; an int, or height and width) that `encode` accepts, if the backbone has a fixed size."""
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
        """This tokenizer with tokens of `bits` bits, the leading bits of its own. Needs a codebook ordered as a tree; shares weights."""
        return ImageTokenizer(self.backbone, self.quantizer.coarser(bits))

    def attach(self, quantizer: Quantizer) -> None:
        """Replaces the quantizer by another of the same widths."""
        for name in ("encoder_channels", "latent_channels"):
            wanted, given = getattr(self.backbone, name), getattr(quantizer, name)
            if wanted != given:
                raise UserError(f"quantizer: its {name} are {given}, the backbone's are {wanted}: configure both alike")
        self.quantizer = quantizer

    def freeze_encoder(self) -> None:
        """Freezes the encoder, so that tokens no longer change."""
        self.backbone.encoder.requires_grad_(False).eval()


def check_images(images: Tensor) -> tuple[float, float]:
    """The smallest and the largest value of images. Raises UserError if they are not floating point (B, 3, H, W), or have a value outside
    [-1, 1] by more than rounding, or NaN."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype not in FLOATS:
        raise UserError(f"images must be floating point (B, 3, H, W) in [-1, 1], not {images.dtype} {tuple(images.shape)}")
    if not has_values(images) or not images.numel():
        return -1.0, 1.0
    lowest, highest = (float(value) for value in images.aminmax())
    if not (lowest >= -1 - ROUNDING and highest <= 1 + ROUNDING):
        hint = "they seem to be in [0, 255]: give images / 127.5 - 1" if 0 <= lowest <= highest <= 255 else "rescale them first"
        raise UserError(f"images must be in [-1, 1], not from {lowest:g} to {highest:g}: {hint}")
    return lowest, highest

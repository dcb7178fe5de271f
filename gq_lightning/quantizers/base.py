"""Quantizer: features to latents (in training), to tokens and back (everywhere else). Three methods work on the last axis of any shape:

features (..., encoder_channels) --forward-----> Quantized.latents (..., latent_channels)    the training relaxation
features (..., encoder_channels) --tokenize----> tokens (..., tokens_per_position) int64
tokens (..., tokens_per_position) --detokenize-> latents (..., latent_channels)              the decoder's input

A quantizer with Gaussian posteriors also has `posterior` and is a PosteriorQuantizer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from gq_lightning.construction import Recorded
from gq_lightning.errors import UserError
from gq_lightning.quantizers.tdc import TargetDivergence

PenaltyReduction = Literal["element_mean", "image_sum"]
INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussians, float32 or wider, and their KL divergence from N(0, 1) in bits.

    Attributes:
        mean, log_variance: (..., latent_channels).
        bits: (..., tokens_per_position), the divergence of each token.
        dimension_bits: (latent_channels,), the divergence of each dimension, averaged over all positions.
    """

    mean: Tensor
    log_variance: Tensor
    bits: Tensor
    dimension_bits: Tensor

    def detach(self) -> "Posterior":
        return Posterior(self.mean.detach(), self.log_variance.detach(), self.bits.detach(), self.dimension_bits.detach())


@dataclass(frozen=True)
class Quantized:
    """The result of `forward`.

    Attributes:
        latents: (..., latent_channels), for the decoder; gradients flow to the features.
        penalty: scalar, added to the reconstruction loss, which is summed over the pixels of an image and averaged over images.
        posterior: detached; None if the quantizer has no posterior.
        diagnostics: detached scalars by name.
    """

    latents: Tensor
    penalty: Tensor
    posterior: Posterior | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


class Quantizer(Recorded, nn.Module, ABC):
    """The contract of every quantizer. The subclass sets the attributes. Its constructor takes plain values with type annotations, as
    `construction.build` wants them.

    Attributes:
        encoder_channels: channels of the features it takes.
        latent_channels: channels of the latents it returns.
        codebook_size: tokens are integers in [0, codebook_size).
        tokens_per_position: tokens at each position of the grid.
        bits_per_position: tokens_per_position * log2(codebook_size), with the actual codebook size.
    """

    encoder_channels: int
    latent_channels: int
    codebook_size: int
    tokens_per_position: int
    bits_per_position: float

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """The differentiable relaxation used in training, and its penalty; the same in train and eval mode."""

    @abstractmethod
    def tokenize(self, features: Tensor) -> Tensor:
        """Features (..., encoder_channels) to tokens (..., tokens_per_position), int64.

        Raises:
            UserError: the last axis has another length, here and in `forward`.
        """

    @abstractmethod
    def detokenize(self, tokens: Tensor) -> Tensor:
        """Tokens (..., tokens_per_position) of any integer type to latents (..., latent_channels), float32.

        Raises:
            UserError: a token is not in [0, codebook_size), or the last axis has the wrong length; see `check_tokens`.
        """

    def candidates(self, features: Tensor, count: int) -> Tensor:
        """The `count` best tokens, best first, the first being that of `tokenize`: (..., tokens_per_position, count).

        Raises:
            UserError: this quantizer cannot rank tokens, or has fewer than `count`.
        """
        raise UserError(f"refine: {type(self).__name__} cannot rank alternative tokens: leave it out")

    def coarser(self, bits: int) -> "Quantizer":
        """This quantizer with tokens of `bits` bits, the leading bits of its own tokens; parameters and buffers are shared.

        Raises:
            UserError: the bits of its tokens are not ordered, or are fewer than `bits`.
        """
        raise UserError(f"bits: the tokens of a {type(self).__name__} cannot be shortened: leave it out")


class PosteriorQuantizer(Quantizer):
    """A quantizer with Gaussian posteriors: a Gaussian VAE before its conversion.

    Attributes:
        tdc: the constraint on the divergence of its tokens, whose multipliers the TDC callback updates; None if the divergence is exact.
        vae: the quantizer that the Gaussian VAE was trained with and that defines the posteriors; None if they are its own.
    """

    tdc: TargetDivergence | None
    vae: "PosteriorQuantizer | None"
    later_arguments: ClassVar[Mapping[str, Any]] = {"vae": None}

    @abstractmethod
    def posterior(self, features: Tensor) -> Posterior:
        """Features (..., encoder_channels) to their posteriors; gradients flow to the features."""

    def with_posterior_of(self, vae: "PosteriorQuantizer") -> Self:
        """This quantizer with the posteriors of `vae`, the quantizer that the encoder was trained with.

        Returns a new quantizer with the argument `vae`, or this one if its own posteriors are the same.
        """
        device = next(vae.buffers()).device
        features = torch.linspace(-8, 8, 64 * vae.encoder_channels, device=device).view(64, -1)
        ours, theirs = self.to(device).posterior(features), vae.posterior(features)
        if torch.equal(ours.mean, theirs.mean) and torch.equal(ours.log_variance, theirs.log_variance):
            return self
        return type(self)(**self.init_args | {"vae": vae}).to(device)


def tokens_of_rate(bits_per_position: float, codebook_size: int) -> tuple[int, float]:
    """Tokens per position and bits per token for a rate and a codebook size.

    The rate may differ by half a bit per token, the TDC's own tolerance: 64 000 codewords fit 16 bits, 32 768 do not. Raises UserError if
    the rate is not a whole number of tokens.
    """
    if codebook_size < 2:
        raise UserError(f"codebook_size: {codebook_size}: give 2 or more")
    bits = math.log2(codebook_size)
    tokens = round(bits_per_position / bits)
    if tokens < 1 or abs(bits_per_position - tokens * bits) > 0.5 * tokens:
        count = max(tokens, 1)
        raise UserError(
            f"bits_per_position: {bits_per_position:g} is not a whole number of tokens of {bits:g} bits (codebook_size"
            f" {codebook_size}): use {count * bits:g} bits or a codebook of 2^{bits_per_position / count:g}"
        )
    return tokens, bits


def check_reduction(reduction: str) -> PenaltyReduction:
    """Raises UserError unless `reduction` is one of `PenaltyReduction`."""
    if reduction not in get_args(PenaltyReduction):
        raise UserError(f"penalty_reduction: {reduction!r}: give 'element_mean' or 'image_sum'")
    return reduction  # type: ignore[return-value]


def reduced(mean: Tensor, elements: int, features: Tensor, reduction: PenaltyReduction) -> Tensor:
    """Scales a term of the penalty from its mean over all elements of the batch, a scalar: `element_mean` is that mean, as in the published
    code. `image_sum` sums over the elements of an image, averaged over images, which is positions * elements times as large. The axes of
    `features` between the first and the last are the positions; `elements` of a position are the channels of a distance, the tokens or bits
    of an entropy.

    Data-parallel training and accumulation average the means of batches of equal size, which gives the mean over all of them.
    """
    return mean if reduction == "element_mean" else mean * (math.prod(features.shape[1:-1]) * elements)


def has_values(tensor: Tensor) -> bool:
    """Whether its values can be looked at: a meta tensor has none, nor has what `torch.export` traces with."""
    return not (tensor.is_meta or torch.compiler.is_exporting())


def checked(features: Tensor, channels: int) -> Tensor:
    """Features (..., channels) in float32, whatever the encoder's precision. Raises UserError if the last axis has another length."""
    if features.ndim == 0 or features.shape[-1] != channels:
        raise UserError(f"features of shape {tuple(features.shape)}: the last axis must have {channels} channels")
    return features.float()


def check_tokens(tokens: Tensor, codebook_size: int, tokens_per_position: int) -> Tensor:
    """Tokens (..., tokens_per_position) of any integer type, as int64. Raises UserError if they are not integers, not in [0,
    codebook_size), or the last axis has another length."""
    if tokens.dtype not in INTEGERS:
        raise UserError(f"tokens are {tokens.dtype}: give integers (int64)")
    if tokens.ndim == 0 or tokens.shape[-1] != tokens_per_position:
        raise UserError(f"tokens of shape {tuple(tokens.shape)}: the last axis must have {tokens_per_position} tokens per position")
    # uint64 values from 2^63 on become negative, and are refused below
    tokens = tokens.long()
    if has_values(tokens) and tokens.numel():
        lowest, highest = (int(value) for value in tokens.aminmax())
        if lowest < 0 or highest >= codebook_size:
            raise UserError(f"tokens from {lowest} to {highest} are out of range: give tokens from 0 to {codebook_size - 1}")
    return tokens

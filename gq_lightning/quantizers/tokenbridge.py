"""TokenBridge, https://arxiv.org/abs/2503.16430: each latent dimension of a Gaussian VAE is discretised separately, after training.

    features [mean, log variance] --forward-----> mean + sigma * noise, penalty on the KL of each dimension
                                  --tokenize----> per dimension, the value nearest to the mean
                     tokens       --detokenize--> that value

N(0, 1) is divided into K bins of equal probability, and the values are their medians, the quantiles at (j + 0.5) / K. In terms of
Gaussian Quant (https://arxiv.org/abs/2512.06609, section 5), this is a codebook of quantiles instead of random vectors, with groups of
one dimension and no weight on the prior. (The authors' own code uses the mean of each bin, cut off at three standard deviations,
instead of the median.)
"""

import torch
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import Posterior, PosteriorQuantizer, Quantized
from gq_lightning.quantizers.gaussian import GaussianQuantizer
from gq_lightning.quantizers.tdc import TargetDivergence, Variant

MOST_BITS = 16


class TokenBridge(PosteriorQuantizer):
    """Diagonal Gaussian posteriors, replaced by the nearest quantile of N(0, 1) in each dimension: one token per latent channel.

    It can be attached to a Gaussian VAE that was trained with another quantizer (`callbacks.GaussianQuant(quantizer=...)`), or trained
    directly: with `tdc_variant: fixed` as a plain VAE, the published method, or with a target divergence for each dimension.

    Args:
        bits_per_position: rate at each position of the grid, a whole number of bits (1 to 16) for each latent channel.
        latent_channels: latent dimensions per position, and tokens per position.
        tdc_alpha: half-width of the TDC's tolerance band, in bits.
        tdc_beta: the TDC's factor per step.
        tdc_variant: rule of the TDC, `paper` or `reference`; `fixed` gives a plain Gaussian VAE with a constant KL weight.
        penalty_weight: weight of the KL penalty (in bits, summed over the dimensions of an image) in the loss.
        vae: the quantizer that the encoder was trained with and that defines the posteriors; set by `callbacks.GaussianQuant`.

    Raises:
        UserError: the channels cannot share the bits equally.
    """

    training_arguments = frozenset({"tdc_alpha", "tdc_beta", "tdc_variant", "penalty_weight"})

    def __init__(
        self,
        bits_per_position: int = 16,
        latent_channels: int = 16,
        tdc_alpha: float = 0.5,
        tdc_beta: float = 1.01,
        tdc_variant: Variant = "paper",
        penalty_weight: float = 0.1,
        vae: PosteriorQuantizer | None = None,
    ) -> None:
        super().__init__()
        if latent_channels < 1:
            raise UserError(f"latent_channels: {latent_channels}: give 1 or more")
        bits, remainder = divmod(bits_per_position, latent_channels)
        if remainder or not 1 <= bits <= MOST_BITS:
            nearest = latent_channels * min(max(round(bits_per_position / latent_channels), 1), MOST_BITS)
            raise UserError(
                f"bits_per_position: {bits_per_position:g} is not a whole number of bits, 1 to {MOST_BITS}, for each of {latent_channels}"
                f" latent channels: use {nearest}, or latent_channels that divide it"
            )
        self.gaussian: GaussianQuantizer = GaussianQuantizer(
            bits_per_position,
            latent_channels,
            codebook_size=2 ** int(bits),
            codebook="quantile",
            prior_weight=0.0,
            tdc_alpha=tdc_alpha,
            tdc_beta=tdc_beta,
            tdc_variant=tdc_variant,
            penalty_weight=penalty_weight,
            vae=vae,
        )
        self.encoder_channels, self.latent_channels = self.gaussian.encoder_channels, self.gaussian.latent_channels
        self.codebook_size, self.tokens_per_position = self.gaussian.codebook_size, self.gaussian.tokens_per_position
        self.bits_per_position = self.gaussian.bits_per_position
        self.recipe = f"quantile codebook of {self.codebook_size} x 1"

    @property
    def tdc(self) -> TargetDivergence | None:  # type: ignore[override]
        """The multipliers, which the TDC callback updates; the target is the bits of one dimension."""
        return self.gaussian.tdc

    @property
    def vae(self) -> PosteriorQuantizer | None:  # type: ignore[override]
        return self.gaussian.vae

    @property
    def codebook_fingerprint(self) -> Tensor:
        """SHA-256 of the values, (32,) uint8, saved with the weights and compared on loading."""
        return self.gaussian.codebook_fingerprint

    def forward(self, features: Tensor) -> Quantized:
        return self.gaussian(features)

    def posterior(self, features: Tensor) -> Posterior:
        return self.gaussian.posterior(features)

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        return self.gaussian.tokenize(features)

    @torch.no_grad()
    def candidates(self, features: Tensor, count: int) -> Tensor:
        return self.gaussian.candidates(features, count)

    def detokenize(self, tokens: Tensor) -> Tensor:
        return self.gaussian.detokenize(tokens)

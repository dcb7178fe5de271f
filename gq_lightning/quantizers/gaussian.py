"""Gaussian Quant, https://arxiv.org/abs/2512.06609: a Gaussian VAE in training, a VQ-VAE with a random codebook afterwards.

    features [mean, log variance] --forward-----> mean + sigma * noise, penalty on the KL of each token
                                  --tokenize----> the codeword of N(0, 1) noise that fits the posterior best
                     tokens       --detokenize--> that codeword

A token covers a group of m latent dimensions at one position, and its codebook has K = 2^B codewords. The conversion works well if the
KL of every token is near B bits, which the target divergence constraint (`tdc`) enforces in training.
"""

import copy
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import Posterior, PosteriorQuantizer, Quantized, check_tokens, checked, tokens_of_rate
from gq_lightning.quantizers.codebook import Generator, Order, fingerprint, fingerprint_of_float64_points, gaussian_codebook, ordered
from gq_lightning.quantizers.exact import exact_posterior
from gq_lightning.quantizers.search import best_codewords, k_best_codewords
from gq_lightning.quantizers.tdc import TargetDivergence, Variant

BITS_PER_CHANNEL = 2


class GaussianQuantizer(PosteriorQuantizer):
    """Diagonal Gaussian posteriors, replaced by codewords of a fixed random codebook.

    Args:
        bits_per_position: rate at each position of the grid. A whole number of tokens of log2(codebook_size) bits.
        latent_channels: latent dimensions per position, shared equally by the tokens. None takes one for every two bits; the paper uses
            16 at every rate.
        codebook_size: K, the number of codewords; all tokens share one codebook.
        codebook: `iid` normal draws (the paper), `sobol` quantiles (the published models), or `quantile`, evenly spaced quantiles
            (TokenBridge; groups of one channel only).
        seed: of the codebook.
        prior_weight: weight omega of the prior in the score of a codeword, see `best_codewords`. The published models use 1.
        layout: which channels form group g of n, with m channels each: `contiguous` g*m .. g*m+m-1, or `strided` g, g+n,
            g+2n, ... (the published models).
        tdc_alpha: half-width of the TDC's tolerance band, in bits.
        tdc_beta: the TDC's factor per step.
        tdc_variant: rule of the TDC, `paper` or `reference`; `fixed` gives a plain Gaussian VAE with a constant KL weight.
        penalty_weight: weight of the KL penalty (in bits, summed over the tokens of an image) in the loss.
        clamp_variance: clamp variances to 1 / prior_weight in `tokenize`. Above it the posterior is wider than the weighted prior, and
            the score would favour the longest codeword regardless of the mean. Turn it off for published models.
        initial_log_variance: added to the encoder's log-variances. Features are near 0 at the start, so training begins with this value.
            None takes -2 ln 2 * bits_per_position / latent_channels, at which each dimension costs its share of the bits. From 0,
            posteriors would be as wide as the prior, and the multipliers would need hundreds of steps before tokens cost anything.
        exact_divergence: make the KL of every token equal to log2(codebook_size) on any image, see `exact`. There is then no penalty, the
            TDC callback has no effect, and only differences of log-variances within a token matter.
        vae: the quantizer that the encoder was trained with and that defines the posteriors; set by `callbacks.GaussianQuant`.
        order: order of the codewords, see `codebook.ordered`. `tree` orders the bits of a token from coarse to fine, which priors and
            shortened tokens need. Changing the order changes the token numbers of the same latents.
    """

    codewords: Tensor
    codebook_fingerprint: Tensor

    training_arguments = frozenset({"tdc_alpha", "tdc_beta", "tdc_variant", "penalty_weight"})
    later_arguments: ClassVar = {**PosteriorQuantizer.later_arguments, "order": "none"}

    def __init__(
        self,
        bits_per_position: int = 16,
        latent_channels: int | None = None,
        codebook_size: int = 65536,
        codebook: Generator = "iid",
        seed: int = 42,
        prior_weight: float = 1.0,
        layout: Literal["contiguous", "strided"] = "contiguous",
        tdc_alpha: float = 0.5,
        tdc_beta: float = 1.01,
        tdc_variant: Variant = "paper",
        penalty_weight: float = 0.1,
        clamp_variance: bool = True,
        initial_log_variance: float | None = None,
        exact_divergence: bool = False,
        vae: PosteriorQuantizer | None = None,
        order: Order = "none",
    ) -> None:
        super().__init__()
        if layout not in ("contiguous", "strided"):
            raise UserError(f"layout: {layout!r}: give 'contiguous' or 'strided'")
        if not 0 <= prior_weight <= 1:
            raise UserError(f"prior_weight: {prior_weight}: give a number in [0, 1]")
        if not math.isfinite(penalty_weight) or not math.isfinite(initial_log_variance or 0.0):
            raise UserError(f"penalty_weight {penalty_weight} and initial_log_variance {initial_log_variance} must be finite")
        tokens, bits = tokens_of_rate(bits_per_position, codebook_size)
        if latent_channels is None:
            latent_channels = tokens * max(1, round(bits / BITS_PER_CHANNEL))
        if latent_channels < 1 or latent_channels % tokens:
            raise UserError(
                f"latent_channels: {latent_channels} channels cannot be shared by {tokens} tokens per position: use a multiple of {tokens}"
            )
        self.encoder_channels, self.latent_channels = 2 * latent_channels, latent_channels
        self.codebook_size, self.tokens_per_position, self.bits_per_position = codebook_size, tokens, tokens * bits
        self.group_size = latent_channels // tokens
        self.layout, self.prior_weight, self.clamp_variance = layout, float(prior_weight), clamp_variance
        self.penalty_weight, self.target_bits = float(penalty_weight), bits
        share = self.bits_per_position / latent_channels
        self.initial_log_variance = -2 * math.log(2) * share if initial_log_variance is None else float(initial_log_variance)
        # record the derived numbers, so that attaching a codebook of another rate does not change them
        self.init_args |= {"latent_channels": latent_channels, "initial_log_variance": self.initial_log_variance}
        constraint = TargetDivergence(bits, alpha=tdc_alpha, beta=tdc_beta, variant=tdc_variant)
        self.tdc = None if exact_divergence else constraint
        self.vae = vae
        codewords = ordered(gaussian_codebook(codebook, codebook_size, self.group_size, seed), order)
        self.recipe = f"{codebook} codebook of {codebook_size} x {self.group_size} with seed {seed}" + (
            ", as a tree" if order == "tree" else ""
        )
        # the recipe determines the codebook, so only its fingerprint is saved, which `_load_from_state_dict` compares
        self.register_buffer("codewords", codewords, persistent=False)
        self.register_buffer("codebook_fingerprint", torch.tensor(list(fingerprint(codewords)), dtype=torch.uint8))

    def forward(self, features: Tensor) -> Quantized:
        posterior = self.posterior(features)
        latents = posterior.mean + torch.exp(posterior.log_variance / 2) * torch.randn_like(posterior.mean)
        if self.tdc is None:
            return Quantized(latents, latents.new_zeros(()), posterior.detach())
        images = features.shape[0] if features.ndim > 1 else 1
        penalty = self.penalty_weight * self.tdc.penalty(posterior.bits).sum() / images
        return Quantized(latents, penalty, posterior.detach())

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        mean, variance = self._wanted(features)
        tokens = best_codewords(mean.flatten(0, -2), variance.flatten(0, -2), self.codewords, self.prior_weight)
        return tokens.view(mean.shape[:-1])

    @torch.no_grad()
    def candidates(self, features: Tensor, count: int) -> Tensor:
        mean, variance = self._wanted(features)
        tokens = k_best_codewords(mean.flatten(0, -2), variance.flatten(0, -2), self.codewords, count, self.prior_weight)
        return tokens.view(*mean.shape[:-1], count)

    def coarser(self, bits: int) -> "GaussianQuantizer":
        """The codewords are the means of the tree's cells that the first `bits` bits of a token select."""
        if self.init_args.get("order") != "tree":
            raise UserError("bits: only tokens of a codebook ordered as a tree can be shortened: convert the tokenizer with --order tree")
        if not 1 <= bits <= self.target_bits:
            raise UserError(f"bits: tokens of {self.target_bits:g} bits cannot be shortened to {bits}: use 1 to {self.target_bits:g}")
        coarse = copy.copy(self)
        coarse._buffers = dict(self._buffers)
        coarse.codebook_size, coarse.bits_per_position = 2**bits, float(self.tokens_per_position * bits)
        coarse.codewords = self.codewords.unflatten(0, (2**bits, -1)).mean(1)
        return coarse

    def detokenize(self, tokens: Tensor) -> Tensor:
        tokens = check_tokens(tokens, self.codebook_size, self.tokens_per_position)
        return self.ungroup(self.codewords[tokens])

    def posterior(self, features: Tensor) -> Posterior:
        mean, log_variance = self._moments(features)
        divergence = kl_bits(mean, log_variance)
        return Posterior(mean, log_variance, self.group(divergence).sum(dim=-1), divergence.flatten(0, -2).mean(dim=0))

    def _wanted(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances for the search, (..., tokens_per_position, group_size) each."""
        mean, log_variance = self._moments(features)
        variance = log_variance.exp()
        if self.clamp_variance and self.prior_weight > 0:
            variance = variance.clamp(max=1 / self.prior_weight)
        return self.group(mean), self.group(variance)

    def _moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, (..., latent_channels) each, in float32 whatever the encoder's precision."""
        if self.vae is not None:
            posterior = self.vae.posterior(features)
            return posterior.mean, posterior.log_variance
        mean, log_variance = checked(features, self.encoder_channels).chunk(2, dim=-1)
        if self.tdc is None:
            groups = exact_posterior(self.group(mean), self.group(log_variance), self.target_bits * math.log(2))
            return self.ungroup(groups[0]), self.ungroup(groups[1])
        return mean, (log_variance + self.initial_log_variance).clamp(-30.0, 20.0)

    def group(self, channels: Tensor) -> Tensor:
        """(..., latent_channels) to (..., tokens_per_position, group_size), by `layout`."""
        if self.layout == "contiguous":
            return channels.unflatten(-1, (self.tokens_per_position, self.group_size))
        return channels.unflatten(-1, (self.group_size, self.tokens_per_position)).transpose(-1, -2)

    def ungroup(self, groups: Tensor) -> Tensor:
        """The inverse of `group`."""
        return (groups if self.layout == "contiguous" else groups.transpose(-1, -2)).flatten(-2)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # rounding would change the codewords, so the codebook moves with the module but stays float32
        kept = self.codewords
        super()._apply(fn, recurse)
        if self.codewords.dtype != kept.dtype:
            self.codewords = kept.to(self.codewords.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "codebook_fingerprint")
        if saved is not None and not torch.equal(saved.cpu(), self.codebook_fingerprint.cpu()):
            if self.init_args.get("codebook") == "sobol":
                earlier = fingerprint_of_float64_points(self.codebook_size, self.group_size, self.init_args["seed"])
                if bytes(saved.tolist()) == earlier:
                    raise UserError(
                        f"these weights belong to the {self.recipe} of an earlier version, which drew Sobol points in float64; "
                        "the published models draw them in float32: convert or import the VAE again"
                    )
            ours, theirs = (bytes(value.tolist()).hex()[:16] for value in (self.codebook_fingerprint, saved))
            raise UserError(
                f"these weights belong to another codebook ({theirs}…) than the configured {self.recipe} ({ours}…): restore the config"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.recipe}, {self.tokens_per_position} tokens per position, {self.layout}, prior_weight={self.prior_weight:g}"


def kl_bits(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of each element, in bits, the bits-back cost; half precision is computed in float32."""
    dtype = torch.promote_types(torch.promote_types(mean.dtype, log_variance.dtype), torch.float32)
    mean, log_variance = mean.to(dtype), log_variance.to(dtype)
    # expm1: near N(0, 1) the terms of sigma^2 - 1 - log sigma^2 cancel
    return (mean.square() + (torch.expm1(log_variance) - log_variance)) / (2 * math.log(2))

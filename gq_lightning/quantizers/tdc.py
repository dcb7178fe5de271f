"""Target Divergence Constraint (TDC), https://arxiv.org/abs/2512.06609.

TDC drives the KL divergence of every token, its bits-back cost, to the log2 K bits of the codebook that will replace the posterior.
Three multipliers weigh the divergence of tokens below, within and above the tolerance band around the target. After each step they
follow the smallest, the mean and the largest divergence of the global batch.

Differences from the authors' code: divergences are in exact bits (their ln 2 is rounded, 0.99993 of it), the target is the real log2 K
(theirs is truncated, 15 bits for 64 000 codewords), and the multipliers do not move in evaluation or while a discriminator learns.
Theirs also move on every second batch, which trains the discriminator, so a `beta` of 1.0201 here matches their 1.01 in generator steps.

Limits: a multiplier can only push tokens down. Once `lambda_min` has reached its floor, only the reconstruction loss raises the tokens
below the band. On a small ViT at 32 bits per position, 99 % of held-out tokens are within half a bit after 1 500 steps. On a small UNet,
`lambda_max` is at its ceiling and `lambda_min` at its floor after 450 of 1 000 steps; the mean is at the target, but only 38 % of the
tokens are within half a bit, and a faster `beta` cannot help. A probable cause is GroupNorm: it has one scale for all positions of an
image, where LayerNorm has one per position, so the bits can follow the content. The exact divergence (`exact`) has no such limit.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gq_lightning.errors import UserError

Variant = Literal["paper", "reference", "fixed"]
LOWEST, HIGHEST = 1e-3, 1e3


class TargetDivergence(nn.Module):
    """The multipliers, kept as buffers: saved in checkpoints, moved with the module, never read by the host.

    Args:
        target_bits: target divergence of every token, in bits: log2 of the codebook size, not rounded.
        alpha: half-width of the tolerance band around it, in bits.
        beta: factor by which a multiplier moves per update.
        variant: `paper` is the paper's rule, three independent multipliers in [1e-3, 1e3]. `reference` is what the authors'
            code computes: lambda_mean, unclipped, multiplies every token, lambda_max in [1, 1e3] additionally those above the
            band and lambda_min in [1e-3, 1] those below it. `fixed` leaves all at 1: a plain Gaussian VAE.
    """

    lambda_min: Tensor
    lambda_mean: Tensor
    lambda_max: Tensor

    def __init__(self, target_bits: float, alpha: float = 0.5, beta: float = 1.01, variant: Variant = "paper") -> None:
        super().__init__()
        if not target_bits > 0 or not alpha >= 0 or not beta > 1:
            raise UserError(f"target_bits must be > 0, alpha >= 0 and beta > 1, not {target_bits}, {alpha} and {beta}")
        if variant not in get_args(Variant):
            raise UserError(f"variant: {variant!r} is none of {', '.join(get_args(Variant))}")
        self.target_bits, self.alpha, self.beta, self.variant = float(target_bits), float(alpha), float(beta), variant
        for name in ("lambda_min", "lambda_mean", "lambda_max"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32))

    def penalty(self, bits: Tensor) -> Tensor:
        """Weighted divergence of each token: `bits` of any shape, in bits, to the same shape. The multipliers carry no gradient."""
        below, above = bits < self.target_bits - self.alpha, bits > self.target_bits + self.alpha
        if self.variant != "reference":
            weight = torch.where(below, self.lambda_min, torch.where(above, self.lambda_max, self.lambda_mean))
        else:
            outside = torch.where(below, self.lambda_min, torch.where(above, self.lambda_max, torch.ones_like(self.lambda_max)))
            weight = self.lambda_mean * outside
        return weight * bits

    @torch.no_grad()
    def update(self, minimum: Tensor | float, mean: Tensor | float, maximum: Tensor | float) -> None:
        """Updates the multipliers after an optimizer step, from the statistics (bits) of all tokens of the global batch.

        Each multiplier grows by `beta` where its statistic exceeds its threshold and shrinks by `beta` otherwise.
        """
        if self.variant == "fixed":
            return
        paper = self.variant == "paper"
        for multiplier, statistic, threshold, lowest, highest in (
            (self.lambda_min, minimum, self.target_bits - self.alpha, LOWEST, HIGHEST if paper else 1.0),
            (self.lambda_mean, mean, self.target_bits, LOWEST if paper else None, HIGHEST if paper else None),
            (self.lambda_max, maximum, self.target_bits + self.alpha, LOWEST if paper else 1.0, HIGHEST),
        ):
            # torch.where, since a comparison on the host would wait for the device at every step
            exceeds = torch.as_tensor(statistic, device=multiplier.device) > threshold
            moved = torch.where(exceeds, multiplier * self.beta, multiplier / self.beta)
            multiplier.copy_(moved if lowest is None and highest is None else moved.clamp(lowest, highest))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # bfloat16's 8 bits would lose a factor of 1.01 per step, so the multipliers stay float32 under .to(dtype)
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != torch.float32:
                setattr(self, name, kept[name].to(buffer.device))
        return self

    def extra_repr(self) -> str:
        return f"target_bits={self.target_bits:g}, alpha={self.alpha:g}, beta={self.beta:g}, variant={self.variant!r}"

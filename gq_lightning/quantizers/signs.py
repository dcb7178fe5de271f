"""Sign bits, shared by the lookup-free quantizers: packing signs into tokens, and the entropies of uncertain signs.

Token t of b bits covers the channels t * b to t * b + b - 1, most significant bit first: the signs + - - + are the token 9. This order
is part of the token format and must not change.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gq_lightning.distributed import is_distributed, mean_over_ranks
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import PenaltyReduction, Quantizer, check_reduction, check_tokens, checked, has_values


class SignQuantizer(Quantizer):
    """Tokens of sign bits, one for each channel; latents are the signs times `scale`. The subclass has the relaxation and its penalty."""

    training_arguments = frozenset({"entropy_weight", "commitment", "diversity_gamma", "temperature", "penalty_reduction"})
    scale = 1.0

    def __init__(
        self,
        bits_per_position: int,
        codebook_size: int,
        entropy_weight: float,
        commitment: float,
        diversity_gamma: float,
        temperature: float,
        penalty_reduction: PenaltyReduction,
    ) -> None:
        super().__init__()
        self.tokens_per_position = tokens_of(bits_per_position, codebook_size)
        if not min(entropy_weight, commitment, diversity_gamma) >= 0 or not temperature > 0:
            given = f"{entropy_weight}, {commitment}, {diversity_gamma} and {temperature}"
            raise UserError(f"entropy_weight, commitment and diversity_gamma must be >= 0 and temperature > 0, not {given}")
        self.encoder_channels = self.latent_channels = self.bits_per_position = int(bits_per_position)
        self.codebook_size = codebook_size
        self.entropy_weight, self.commitment = float(entropy_weight), float(commitment)
        self.diversity_gamma, self.temperature = float(diversity_gamma), float(temperature)
        self.penalty_reduction = check_reduction(penalty_reduction)

    @torch.no_grad()
    def tokenize(self, features: Tensor) -> Tensor:
        return pack(checked(features, self.encoder_channels), self.tokens_per_position)

    def detokenize(self, tokens: Tensor) -> Tensor:
        tokens = check_tokens(tokens, self.codebook_size, self.tokens_per_position)
        return self.scale * unpack(tokens, self.latent_channels // self.tokens_per_position)

    def extra_repr(self) -> str:
        return (
            f"{self.bits_per_position} signs, {self.tokens_per_position} tokens per position, entropy_weight={self.entropy_weight:g},"
            f" commitment={self.commitment:g}, diversity_gamma={self.diversity_gamma:g}, temperature={self.temperature:g}"
        )


def tokens_of(bits_per_position: int, codebook_size: int) -> int:
    """Tokens per position for tokens of log2(codebook_size) bits. Raises UserError if the codebook size is not a power of two from 2 to
    2^62, or the rate is not a whole number of tokens."""
    bits = int(codebook_size).bit_length() - 1
    if not 1 <= bits <= 62 or codebook_size != 2**bits:
        nearest = 2 ** min(max(round(math.log2(max(codebook_size, 2))), 1), 62)
        raise UserError(f"codebook_size: {codebook_size} is not a power of two from 2 to 2^62: use {nearest}")
    if bits_per_position != int(bits_per_position) or bits_per_position < 1 or bits_per_position % bits:
        count = max(round(bits_per_position / bits), 1)
        raise UserError(
            f"bits_per_position: {bits_per_position:g} is not a whole number of tokens of {bits} bits (codebook_size"
            f" {codebook_size}): use {count * bits} bits or a codebook of 2^b whose b divides {bits_per_position:g}"
        )
    return int(bits_per_position) // bits


def signs(values: Tensor) -> Tensor:
    """+1 for values >= 0 (including -0.0), else -1; same shape and type."""
    return (values >= 0).to(values.dtype) * 2 - 1


def pack(values: Tensor, tokens: int) -> Tensor:
    """The signs of values (..., tokens * b) as tokens (..., tokens), int64 in [0, 2^b). Raises UserError if a value is not finite."""
    if has_values(values) and not bool(values.isfinite().all()):
        raise UserError("the encoder's features are not finite: the training diverged, or the weights are damaged")
    bits = (values >= 0).unflatten(-1, (tokens, -1)).long()
    return (bits * _weights(bits.shape[-1], values.device)).sum(dim=-1)


def unpack(tokens: Tensor, bits: int) -> Tensor:
    """Tokens (..., n) of `bits` bits, int64, to signs -1 and +1 (..., n * bits), float32; the inverse of `pack`."""
    return ((tokens[..., None] // _weights(bits, tokens.device)) % 2 * 2 - 1).flatten(-2).float()


def _weights(bits: int, device: torch.device) -> Tensor:
    """What each bit counts, first bit most significant. Numbers, not shifts, for which an exported graph has no word."""
    return torch.tensor([1 << place for place in reversed(range(bits))], device=device)


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropies, in nats, of codes whose bits are independent with P(bit = 1) = sigmoid(logit), of logits (positions..., groups, b).

    Each code c of a group of b bits then has probability prod_i sigmoid(+-logit_i). The entropy of such a distribution is the sum of its
    bits' entropies. The mean of many does not factorise over the bits. It is computed over all 2^b codes as a product of the group's two
    halves, so that the distributions of single positions (positions x 2^b numbers) are never in memory.

    Returns two scalars from 0 to groups * b * ln 2, sums over groups: the entropy of a position's groups, averaged over positions; and that
    of each group's mean distribution over the positions of the global batch.
    """
    logits = logits.reshape(-1, *logits.shape[-2:]).float()
    size = logits.abs()
    per_sample = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(dim=(1, 2)).mean()
    half = logits.shape[-1] // 2
    # in float64, which autocast and TF32 do not affect
    high, low = _joint(logits[..., :half]).double(), _joint(logits[..., half:]).double()
    mean = global_mean(torch.einsum("pgi,pgj->gij", high, low).float() / len(logits))
    # an impossible code contributes 0, and the clamp avoids the gradient of log 0
    batch = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
    return per_sample, batch


def _joint(logits: Tensor) -> Tensor:
    """Logits of independent bits (positions, groups, b) to probabilities of codes (positions, groups, 2^b), first bit most significant."""
    joint = logits.new_ones(*logits.shape[:-1], 1)
    for logit in logits.unbind(-1):
        bit = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)], dim=-1)
        joint = (joint[..., :, None] * bit[..., None, :]).flatten(-2)
    return joint


def global_mean(local: Tensor) -> Tensor:
    """The mean of the ranks' means, with the gradient of the local one: data-parallel training averages the ranks' gradients, and by the
    chain rule the average of f'(global) * d local is the gradient of f(global) for any f, without a collective in the backward pass.

    With gradients disabled, this is the local mean: in evaluation, ranks may have different numbers of batches and must not wait.
    """
    if not (torch.is_grad_enabled() and is_distributed()):
        return local
    return local + (mean_over_ranks(local) - local).detach()

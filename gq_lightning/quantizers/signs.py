"""Sign bits: what the lookup-free quantizers share, the packing of signs into tokens and the entropies of uncertain signs.

A token of b bits covers b neighbouring channels, token t those from t * b to t * b + b - 1, the first channel being the most significant
bit: signs + - - + are the token 9. Tokens that were written are read in this order by every version.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gq_lightning.distributed import is_distributed, mean_over_ranks
from gq_lightning.errors import UserError


def tokens_of(bits_per_position: int, codebook_size: int) -> int:
    """Tokens per position, when a token has log2(codebook_size) bits.

    Raises:
        UserError: the codebook's size is not a power of two from 2 to 2^62, or the bits are not a whole number of tokens.
    """
    bits = int(codebook_size).bit_length() - 1
    if not 1 <= bits <= 62 or codebook_size != 2**bits:
        nearest = 2 ** min(max(round(math.log2(max(codebook_size, 2))), 1), 62)
        raise UserError(f"codebook_size: {codebook_size} is not a power of two from 2 to 2^62, all signs of a token: use {nearest}")
    if bits_per_position != int(bits_per_position) or bits_per_position < 1 or bits_per_position % bits:
        count = max(round(bits_per_position / bits), 1)
        raise UserError(
            f"bits_per_position: {bits_per_position:g} is not a whole number of tokens of {bits} bits, codebook_size being"
            f" {codebook_size}: use {count * bits} bits or a codebook of 2^b whose b divides {bits_per_position:g}"
        )
    return int(bits_per_position) // bits


def checked(features: Tensor, channels: int) -> Tensor:
    """Features (..., channels) in float32, whatever the precision of the encoder.

    Raises:
        UserError: the last axis has another length.
    """
    if features.ndim == 0 or features.shape[-1] != channels:
        raise UserError(f"features of shape {tuple(features.shape)}: the last axis must have {channels} channels")
    return features.float()


def signs(values: Tensor) -> Tensor:
    """+1 where values are >= 0, zeros of both signs included, else -1; the same shape and type."""
    return (values >= 0).to(values.dtype) * 2 - 1


def pack(values: Tensor, tokens: int) -> Tensor:
    """The signs of values (..., tokens * b) as tokens (..., tokens), int64 in [0, 2^b).

    Raises:
        UserError: a value is not finite.
    """
    if not bool(values.isfinite().all()):
        raise UserError("features must be finite: the encoder's are not")
    bits = (values >= 0).unflatten(-1, (tokens, -1)).long()
    return (bits << _places(bits.shape[-1], values.device)).sum(dim=-1)


def unpack(tokens: Tensor, bits: int) -> Tensor:
    """Tokens (..., n) of `bits` bits, int64, to signs -1 and +1 (..., n * bits), float32; the inverse of `pack`."""
    return (((tokens[..., None] >> _places(bits, tokens.device)) & 1) * 2 - 1).flatten(-2).float()


def _places(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits - 1, -1, -1, device=device)


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropies, in nats, of codes whose bits are independent with P(bit = 1) = sigmoid(logit).

    Each code c of a group of b bits then has the probability prod_i sigmoid(+-logit_i). The entropy of one such distribution is the sum of
    its bits' entropies. The mean of many does not factorise over the bits; it is taken over all 2^b codes, as one product of the groups'
    two halves, so that the distributions of single positions (positions x 2^b numbers) are never in memory.

    Args:
        logits: (..., groups, b), float32; the leading axes are positions.

    Returns:
        the entropy of a position's groups, summed over groups and averaged over positions, and the entropy of each group's mean
        distribution over the positions of the global batch, summed over groups. Both are scalars from 0 to groups * b * ln 2.
    """
    logits = logits.reshape(-1, *logits.shape[-2:]).float()
    size = logits.abs()
    per_sample = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(dim=(1, 2)).mean()
    half = logits.shape[-1] // 2
    # in float64, which autocast and TF32 leave alone
    high, low = _joint(logits[..., :half]).double(), _joint(logits[..., half:]).double()
    mean = global_mean(torch.einsum("pgi,pgj->gij", high, low).float() / len(logits))
    # a code that no position can have has the entropy 0 and must not have the gradient of log 0
    batch = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
    return per_sample, batch


def _joint(logits: Tensor) -> Tensor:
    """Independent bits (positions, groups, b) to the probabilities (positions, groups, 2^b) of their codes, first bit most significant."""
    joint = logits.new_ones(*logits.shape[:-1], 1)
    for logit in logits.unbind(-1):
        bit = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)], dim=-1)
        joint = (joint[..., :, None] * bit[..., None, :]).flatten(-2)
    return joint


def global_mean(local: Tensor) -> Tensor:
    """The mean over ranks of each rank's mean, with the gradient of the local one.

    Data parallel training averages the ranks' gradients. By the chain rule the average of f'(global) * d local is then the gradient of
    f(global) itself, for any f, without a collective in the backward pass.

    Without gradients the mean is the local one: ranks may have different numbers of batches to evaluate, and must not wait for each other.
    """
    if not (torch.is_grad_enabled() and is_distributed()):
        return local
    return local + (mean_over_ranks(local) - local).detach()

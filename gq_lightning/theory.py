"""Bits, rates and the two bounds of Gaussian Quant, as pure functions (arXiv 2512.06609, https://arxiv.org/abs/2512.06609)."""

import math

import torch
from torch import Tensor


def kl_bits(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) of each element, in bits (arXiv 2512.06609, section 3: the bits-back cost).

    Args:
        mean, log_variance: tensors of one shape (or broadcastable), natural logarithm.

    Returns:
        A tensor of that shape, >= 0, at least in float32; half precision is computed in float32.
    """
    dtype = torch.promote_types(torch.promote_types(mean.dtype, log_variance.dtype), torch.float32)
    mean, log_variance = mean.to(dtype), log_variance.to(dtype)
    # expm1: near N(0, 1) the terms of sigma^2 - 1 - log sigma^2 cancel
    return (mean.square() + (torch.expm1(log_variance) - log_variance)) / (2 * math.log(2))


def bits_per_pixel(bits_per_position: float, downsampling: int) -> float:
    """The rate of a grid with one position per ``downsampling`` x ``downsampling`` pixels (arXiv 2512.06609, section 5)."""
    return bits_per_position / downsampling**2


def expected_usage(codebook_size: int, tokens: int) -> float:
    """Expected share of `codebook_size` codewords that `tokens` uniform draws hit: 1 - (1 - 1/K)^T.

    The yardstick of the codebook usage (arXiv 2512.06609, section 5): few tokens cannot reach 1, however good the code is.
    """
    if tokens == 0 or codebook_size == 1:
        return float(tokens > 0)
    return -math.expm1(tokens * math.log1p(-1 / codebook_size))


def deviation_upper_bound(t: float | Tensor, c1: float) -> Tensor:
    """Bound on Pr(|z_hat - mu| >= sigma) where the codebook has t nats more than the KL: log K = R + t.

    exp(-e^t sqrt(2 / pi) e^(-c1 - 1/2)), for |mu| sigma <= c1: doubly exponential decay (arXiv 2512.06609, section 3).

    Returns:
        float64, the shape of `t`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.exp(-math.sqrt(2 / math.pi) * torch.exp(t - c1 - 0.5))


def deviation_lower_bound(t: float | Tensor, c2: float) -> Tensor:
    """Bound on Pr(|z_hat - mu| >= sigma) where the codebook has t nats less than the KL: log K = R - t.

    1 - e^(-t) sqrt(2 / pi) e^(c2^2 / 2 - 1/2), for |mu| + sigma <= c2; below 0 it says nothing (arXiv 2512.06609, section 3).

    Returns:
        float64, the shape of `t`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return 1 - math.sqrt(2 / math.pi) * torch.exp(c2**2 / 2 - 0.5 - t)

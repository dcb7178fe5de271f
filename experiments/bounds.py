"""The probability that the nearest of K random codewords is farther than sigma from the mean, and its two bounds (arXiv 2512.06609)."""

import math

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor
from torch.special import erfc, log_ndtr


def deviation_upper_bound(t: float | Tensor, c1: float) -> Tensor:
    """Upper bound on Pr(|z_hat - mu| >= sigma) for a codebook with t nats more than the KL: log K = R + t.

    exp(-e^t sqrt(2 / pi) e^(-c1 - 1/2)), for |mu| sigma <= c1: doubly exponential decay (arXiv 2512.06609, section 3).

    Returns:
        float64, the shape of `t`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return torch.exp(-math.sqrt(2 / math.pi) * torch.exp(t - c1 - 0.5))


def deviation_lower_bound(t: float | Tensor, c2: float) -> Tensor:
    """Lower bound on Pr(|z_hat - mu| >= sigma) for a codebook with t nats less than the KL: log K = R - t.

    1 - e^(-t) sqrt(2 / pi) e^(c2^2 / 2 - 1/2), for |mu| + sigma <= c2; vacuous below 0 (arXiv 2512.06609, section 3).

    Returns:
        float64, the shape of `t`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    return 1 - math.sqrt(2 / math.pi) * torch.exp(c2**2 / 2 - 0.5 - t)


def deviation_probability(mean: float | Tensor, sigma: float | Tensor, codebook_size: float | Tensor, *, log: bool = False) -> Tensor:
    """Pr(|z_hat - mu| >= sigma), where z_hat is the nearest to mu of K values drawn from N(0, 1).

    (1 - p)^K with p = Phi(mu + sigma) - Phi(mu - sigma), the quantity between the two bounds of arXiv 2512.06609, section 3.

    Args:
        mean, sigma, codebook_size: broadcastable; sigma >= 0, any K > 0.
        log: return the natural logarithm, which stays finite when the probability underflows.

    Returns:
        float64, of the common shape.
    """
    mu, std, size = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, sigma, codebook_size))
    mu, std = torch.broadcast_tensors(mu.abs(), std)
    # narrow interval: Gauss-Legendre quadrature, because the difference of two tails would cancel
    nodes, weights = (torch.from_numpy(values).to(mu.device) for values in leggauss(16))
    density = torch.exp(-(mu[..., None] + std[..., None] * nodes).square() / 2) / math.sqrt(2 * math.pi)
    tails = (erfc((mu - std) / math.sqrt(2)) - erfc((mu + std) / math.sqrt(2))) / 2
    inside = torch.where(std * (1 + mu) < 1, std * (density @ weights), tails)
    # wide interval: 1 - p is the sum of the two tails
    outside = torch.where(inside < 0.5, torch.log1p(-inside), torch.logaddexp(log_ndtr(mu - std), log_ndtr(-mu - std)))
    return size * outside if log else torch.exp(size * outside)

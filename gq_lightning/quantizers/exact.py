"""Posteriors whose divergence equals the target by construction, without multipliers or a penalty. Not part of arXiv 2512.06609.

    mean (..., m), spread (..., m) --exact_posterior--> mean, log-variance with KL(N(mean, variance) || N(0, 1)) = target, per group

The target divergence constraint drives the KL of each token (a group of m dimensions) towards B. Here the encoder gives only the means
and the *relative* log-variances r, and a common shift s of the log-variances is solved for. In nats, with r centred, E = sum exp(r) and
M = |mean|^2 / 2, the equation KL = B is

    E exp(s) - m s = 2 (B - M) + m.

It has one root on the branch where the posterior is narrower than the prior, provided that M + (m / 2) ln(E / m) < B; the second term is
the cost of the spread of r, whatever the shift. So the spread is scaled down if it would cost more than half of B, and the mean if it
would cost more than 97 % of the rest.
"""

import torch
from torch import Tensor

# largest share of the target for the spread of the variances, and of the rest for the mean
SPREAD, MEAN = 0.5, 0.97
STEPS = 16
WIDEST = 30.0


def exact_posterior(mean: Tensor, log_variance: Tensor, target_nats: float) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (..., m), float32 or wider, whose KL summed over the last axis is `target_nats`, above 0. The mean is unchanged
    unless it would cost too much; only differences of the log-variances within the m values matter."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, relative = mean.to(dtype), log_variance.to(dtype)
    size = mean.shape[-1]
    relative = relative - relative.mean(dim=-1, keepdim=True)
    relative = relative.clamp(-WIDEST, WIDEST)
    relative = relative - relative.mean(dim=-1, keepdim=True)
    # the cost is convex in the scale and 0 at 0, so scaling by bound / cost brings it to the bound or below
    cost = _spread_cost(relative)
    relative = relative * (SPREAD * target_nats / cost.clamp(min=SPREAD * target_nats))
    room = MEAN * (target_nats - _spread_cost(relative))
    energy = mean.square().sum(dim=-1, keepdim=True) / 2
    shrunk = energy > room
    mean = mean * torch.where(shrunk, (room / torch.where(shrunk, energy, 1.0)).sqrt(), 1.0)
    energy = mean.square().sum(dim=-1, keepdim=True) / 2
    return mean, relative + _shift(relative.exp().sum(dim=-1, keepdim=True), 2 * (target_nats - energy) + size, size)


def _spread_cost(relative: Tensor) -> Tensor:
    """The smallest KL (..., 1), in nats, of variances with these ratios."""
    size = relative.shape[-1]
    return size / 2 * (torch.logsumexp(relative, dim=-1, keepdim=True) - torch.log(torch.full_like(relative[..., :1], size)))


def _shift(total: Tensor, right: Tensor, size: int) -> Tensor:
    """The smaller root s of total * exp(s) - size * s = right, all (..., 1), with its gradient by the implicit function theorem."""
    with torch.no_grad():
        # the function is convex, and positive here, so Newton's method approaches the root from the left without overshooting
        shift = -right / size
        for _ in range(STEPS):
            exponential = total * shift.exp()
            shift = shift - (exponential - size * shift - right) / (exponential - size)
        slope = total * shift.exp() - size
    # one more, differentiable step: at the root it changes only the gradient
    return shift - (total * shift.exp() - size * shift - right) / slope

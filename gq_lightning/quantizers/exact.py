"""Posteriors whose divergence equals the target by construction: no multipliers, no penalty. An addition to arXiv 2512.06609.

    mean (..., m), spread (..., m) --exact_posterior--> mean, log-variance with KL(N(mean, variance) || N(0, 1)) = target, per group

The target divergence constraint drives the KL of each group of m dimensions, a token, towards B. Here the encoder gives the means and
the *relative* log-variances r alone, and one shift s of all of them is solved for. With nats, E = sum exp(r), r centred, and
M = |mean|^2 / 2, KL = B reads

    E exp(s) - m s = 2 (B - M) + m,

which has one root on the branch where the posterior is narrower than the prior. It exists as long as M + (m / 2) ln(E / m) < B: the
spread of r costs its second term whatever the shift. So the spread is scaled down where it would take more than half of B, and the mean
where it would take more than 97 % of the rest.
"""

import torch
from torch import Tensor

# shares of the target: what the spread of the variances may cost, and what of the rest the mean may
SPREAD, MEAN = 0.5, 0.97
STEPS = 16
WIDEST = 30.0


def exact_posterior(mean: Tensor, log_variance: Tensor, target_nats: float) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (..., m) of the same shape, float32 or wider, whose KL summed over the last axis is `target_nats`.

    Args:
        mean: (..., m), kept as it is unless it leaves no room.
        log_variance: (..., m); what is common to the m values has no effect.
        target_nats: B, above 0.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, relative = mean.to(dtype), log_variance.to(dtype)
    size = mean.shape[-1]
    relative = relative - relative.mean(dim=-1, keepdim=True)
    relative = relative.clamp(-WIDEST, WIDEST)
    relative = relative - relative.mean(dim=-1, keepdim=True)
    # convex in the scale and 0 at 0: scaled by bound / cost, the spread costs the bound at most
    cost = _spread_cost(relative)
    relative = relative * (SPREAD * target_nats / cost.clamp(min=SPREAD * target_nats))
    room = MEAN * (target_nats - _spread_cost(relative))
    energy = mean.square().sum(dim=-1, keepdim=True) / 2
    shrunk = energy > room
    mean = mean * torch.where(shrunk, (room / torch.where(shrunk, energy, 1.0)).sqrt(), 1.0)
    energy = mean.square().sum(dim=-1, keepdim=True) / 2
    return mean, relative + _shift(relative.exp().sum(dim=-1, keepdim=True), 2 * (target_nats - energy) + size, size)


def _spread_cost(relative: Tensor) -> Tensor:
    """The least KL (..., 1), in nats, that variances of these ratios can have."""
    size = relative.shape[-1]
    return size / 2 * (torch.logsumexp(relative, dim=-1, keepdim=True) - torch.log(torch.full_like(relative[..., :1], size)))


def _shift(total: Tensor, right: Tensor, size: int) -> Tensor:
    """The smaller root s of total * exp(s) - size * s = right, all (..., 1), with its gradient by the implicit function theorem."""
    with torch.no_grad():
        # convex, and positive here: Newton's method approaches the root from the left and never passes it
        shift = -right / size
        for _ in range(STEPS):
            exponential = total * shift.exp()
            shift = shift - (exponential - size * shift - right) / (exponential - size)
        slope = total * shift.exp() - size
    # one more step, differentiable: at the root it moves nothing but the gradient
    return shift - (total * shift.exp() - size * shift - right) / slope

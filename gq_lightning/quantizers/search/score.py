"""The score in float64, without cancelling terms. Every search makes its final decision by it."""

import torch
from torch import Tensor


def scores(mean: Tensor, precision: Tensor, codewords: Tensor, prior_weight: float) -> Tensor:
    """sum over m of prior_weight c^2 - (c - mean)^2 / variance: twice the score, without its constant (see the package). All are float64,
    (..., m) and broadcastable; precision is 1 / variance."""
    return (prior_weight * codewords.square() - (codewords - mean).square() * precision).sum(-1)


def best_of(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, candidates: Tensor) -> Tensor:
    """The best of a few candidates, ties to the lowest index. candidates: (N, n) int64. Returns (N,) int64."""
    score = scores(mean.unsqueeze(1), precision.unsqueeze(1), codebook[candidates].double(), prior_weight)
    winners = score == score.amax(1, keepdim=True)
    return torch.where(winners, candidates, candidates.new_full((), torch.iinfo(torch.int64).max)).amin(1)

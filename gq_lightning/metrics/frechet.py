"""The Fréchet distance of Inception features (FID, https://arxiv.org/abs/1706.08500)."""

import numpy
import scipy.linalg
import torch
from torch import Tensor

Moments = tuple[numpy.ndarray, numpy.ndarray]  # mean (D,) and covariance (D, D), float64


def distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1 C2)^(1/2), >= 0; nan if a covariance is not finite.

    With factors C = F F^T, the last trace is the sum of the singular values of F1^T F2. This is exact even if a covariance is singular
    (fewer vectors than features), and many times faster than the eigenvalues of C1 C2.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    if not (numpy.isfinite(covariance1).all() and numpy.isfinite(covariance2).all()):
        return float("nan")
    cross = scipy.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    found = ((mean1 - mean2) ** 2).sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(float(found), 0.0)  # for equal sets, rounding may give a tiny negative number


def moments(count: int, total: Tensor, products: Tensor) -> Moments:
    """Mean and covariance of vectors, from their number, their sum and the sum of their outer products."""
    mean = total / count
    return mean.cpu().numpy(), ((products - count * torch.outer(mean, mean)) / (count - 1)).cpu().numpy()


def _factor(covariance: numpy.ndarray) -> numpy.ndarray:
    """F (D, rank) with F F^T = covariance, by a pivoted Cholesky decomposition."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    factor = numpy.empty((len(covariance), rank))
    factor[pivots - 1] = numpy.tril(lower)[:, :rank]
    return factor

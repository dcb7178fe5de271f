"""Search for the codeword that fits a Gaussian posterior best, https://arxiv.org/abs/2512.06609.

The score of codeword c under N(mean, variance), summed over the m dimensions,

    log N(c | mean, variance) - prior_weight * log N(c | 0, 1)
        = [mean / variance, (prior_weight - 1 / variance) / 2] . [c, c^2] + const,

is one matrix product (N, 2m) x (2m, K). It is taken in blocks with a running maximum, so that memory is bounded by a block
and neither the N x K scores nor N x K x m log-probabilities exist. The product is in float64: written out like this the terms
cancel where variances are small, and float32 would decide between near codewords by its rounding, differently for each batch size.
"""

import torch
from torch import Tensor

from gq_lightning.errors import UserError

TOKENS_PER_BLOCK = 256
CODEWORDS_PER_BLOCK = 4096


@torch.no_grad()
def best_codewords(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float = 1.0) -> Tensor:
    """The index of the highest score for each posterior; ties go to the lowest index.

    Args:
        mean: (N, m), of the posteriors.
        variance: (N, m), positive.
        codebook: (K, m).
        prior_weight: weight of the prior's log-density in the score (omega). 0 gives the nearest codeword in the posterior's
            metric, 1 the largest ratio of posterior to prior. Where prior_weight * variance > 1 the score grows with the
            codeword's length.

    Returns:
        (N,) int64.

    Raises:
        UserError: shapes that do not match, or values that are not finite and positive.
    """
    if mean.shape != variance.shape or mean.ndim != 2 or codebook.ndim != 2 or mean.shape[1] != codebook.shape[1]:
        shapes = f"{tuple(mean.shape)}, {tuple(variance.shape)}, {tuple(codebook.shape)}"
        raise UserError(f"mean, variance and codebook must be (N, m), (N, m) and (K, m), not {shapes}")
    codewords = codebook.double()
    precision = variance.double().reciprocal()
    linear, quadratic = mean.double() * precision, (prior_weight - precision) / 2
    query = torch.cat([linear, quadratic], dim=1)
    if not bool((torch.isfinite(query).all() & (precision > 0).all()).item()):
        raise UserError("means and variances must be finite and variances positive: the encoder's features are not")
    keys = torch.cat([codewords, codewords.square()], dim=1)  # (K, 2m)
    tokens = torch.empty(len(query), dtype=torch.int64, device=query.device)
    for begin in range(0, len(query), TOKENS_PER_BLOCK):
        block = query[begin : begin + TOKENS_PER_BLOCK]
        best = torch.full((len(block),), -torch.inf, dtype=query.dtype, device=query.device)
        index = torch.zeros(len(block), dtype=torch.int64, device=query.device)
        for first in range(0, len(keys), CODEWORDS_PER_BLOCK):
            score, where = (block @ keys[first : first + CODEWORDS_PER_BLOCK].T).max(dim=1)
            better = score > best  # strictly, so that the earlier block keeps a tie
            best = torch.where(better, score, best)
            index = torch.where(better, where + first, index)
        tokens[begin : begin + TOKENS_PER_BLOCK] = index
    return tokens

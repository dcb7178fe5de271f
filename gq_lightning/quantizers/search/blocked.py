"""Search in plain torch: a float32 product in blocks keeps the maximum of each group of codewords; float64 then decides among the best.

    [mean / variance, (prior_weight - 1 / variance) / 2] . [c, c^2]   -> maxima of groups -> the groups within rounding of the best one
                                                                     -> their codewords' scores in float64

The terms of the product cancel, so float32 cannot decide between codewords with close scores. But its error is bounded, and a group
whose maximum is further than the bound from the best is rejected. Neither the N x K scores nor the N x K x m log-probabilities are
ever stored.
"""

import torch
from torch import Tensor

from gq_lightning.quantizers.search.prepared import prepared

TOKENS_PER_BLOCK = 256
CODEWORDS_PER_BLOCK = 4096
GROUP = 32
PAIRS_PER_BLOCK = 4096


def best(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, k: int) -> Tensor:
    """The k best, k at most K: (N, k) int64. mean, precision: (N, m) float64; codebook (K, m)."""
    keys, largest = prepared(codebook, _keys)
    query, slack = scaled_query(mean, precision, largest, prior_weight, keys.dtype)
    tokens = []
    for begin in range(0, len(query), TOKENS_PER_BLOCK):
        part = slice(begin, begin + TOKENS_PER_BLOCK)
        # (n, groups): group g of a block has its codewords g, g + width, g + 2 width, …, so that the maximum runs along memory
        maxima = torch.cat(
            [(query[part] @ block.T).view(len(query[part]), GROUP, -1).amax(1) for block in keys.split(CODEWORDS_PER_BLOCK)], dim=1
        )
        # k groups each have a codeword at least as good as the k-th largest maximum; with fewer groups, all are needed
        least = maxima.topk(k, dim=1).values[:, -1] if 1 < k <= maxima.shape[1] else maxima.amax(1) if k == 1 else maxima.amin(1)
        near = maxima >= (least.double() - 2 * slack[part]).unsqueeze(1)
        tokens.append(_decide(mean[part], precision[part], codebook, prior_weight, near, k))
    return torch.cat(tokens)


def scaled_query(mean: Tensor, precision: Tensor, largest: Tensor, prior_weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One side of the product, (N, 2m) in `dtype`, scaled to a largest element of 1 (which changes no maximum); and (N,) float64, a bound
    on the error of a product of it, conversion included, for any order of summation (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1). `largest` (2m,) float64 has the largest magnitude of each column of the other side."""
    query = torch.cat([mean * precision, (prior_weight - precision) / 2], dim=1)
    query = query / query.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    roundings = query.shape[1] + 4
    return query.to(dtype), query.abs() @ largest * (roundings * torch.finfo(dtype).eps) + torch.finfo(torch.float32).tiny


def scores(mean: Tensor, precision: Tensor, codewords: Tensor, prior_weight: float) -> Tensor:
    """sum over m of prior_weight c^2 - (c - mean)^2 / variance: twice the score, without its constant (see the package). All are float64,
    (..., m) and broadcastable; precision is 1 / variance."""
    return (prior_weight * codewords.square() - (codewords - mean).square() * precision).sum(-1)


def _keys(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """[c, c^2] as (K, 2m), K filled up to whole groups, and the largest magnitude of each column."""
    codewords = codebook.double()
    # pad with the first codeword: the original has a lower index and wins every tie
    codewords = torch.cat([codewords, codewords[:1].expand(-len(codewords) % GROUP, -1)])
    keys = torch.cat([codewords, codewords.square()], dim=1)
    # if torch may round the factors of a float32 product to fewer bits, the error bound is useless
    exact = codebook.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return keys.to(torch.float32 if exact else torch.float64), keys.abs().amax(0)


def _decide(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, near: Tensor, k: int) -> Tensor:
    """The k best codewords of the remaining groups, in float64. near: (n, groups). Returns (n, k) int64."""
    size, filled = len(codebook), len(codebook) + -len(codebook) % GROUP
    row, column = near.nonzero().unbind(1)
    counts = row.bincount(minlength=len(near))
    # each row lists a token's groups; the padding has no codewords
    groups = row.new_full((len(near), int(counts.max())), near.shape[1])
    groups[row, torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]] = column
    order = counts.argsort(descending=True)  # rows of similar lengths together
    tokens = torch.empty(len(mean), k, dtype=torch.int64, device=mean.device)
    members, groups_per_block = torch.arange(GROUP, device=mean.device), CODEWORDS_PER_BLOCK // GROUP
    begin = 0
    while begin < len(order):
        most = int(counts[order[begin]])
        rows = order[begin : begin + max(1, PAIRS_PER_BLOCK // most)]
        begin += len(rows)
        group = groups[rows, :most]
        start = group // groups_per_block * CODEWORDS_PER_BLOCK
        width = (filled - start).clamp_max(CODEWORDS_PER_BLOCK) // GROUP
        index = (start + group % groups_per_block).unsqueeze(-1) + members * width.unsqueeze(-1)  # (rows, most, GROUP)
        index = torch.where((group < near.shape[1]).unsqueeze(-1) & (index < size), index, size).flatten(1)
        codewords = codebook[index.clamp_max(size - 1)].double()
        score = scores(mean[rows].unsqueeze(1), precision[rows].unsqueeze(1), codewords, prior_weight).masked_fill_(
            index == size, -torch.inf
        )
        if k == 1:
            winners = score == score.amax(1, keepdim=True)
            tokens[rows] = torch.where(winners, index, size).amin(1, keepdim=True)
        else:
            index, ascending = index.sort(1)
            ranks = score.gather(1, ascending).sort(dim=1, descending=True, stable=True).indices[:, :k]  # ties in order of index
            tokens[rows] = index.gather(1, ranks)
    return tokens

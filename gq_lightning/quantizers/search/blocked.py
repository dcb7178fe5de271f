"""Plain torch: a float32 product in blocks, of which the maximum over each group of codewords is kept, then float64 where it matters.

    [mean / variance, (prior_weight - 1 / variance) / 2] . [c, c^2]   -> maxima of groups -> the groups within rounding of the best one
                                                                     -> their codewords' scores in float64

Written as a product the terms cancel, so that float32 cannot decide between near codewords; but its error has a bound, and a group
whose maximum is further than that from the best is out. Neither the N x K scores nor N x K x m log-probabilities exist.
"""

import torch
from torch import Tensor

from gq_lightning.quantizers.search.prepared import prepared
from gq_lightning.quantizers.search.score import scores

TOKENS_PER_BLOCK = 256
CODEWORDS_PER_BLOCK = 4096
GROUP = 32
PAIRS_PER_BLOCK = 4096


def search(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """mean, precision: (N, m) float64; codebook (K, m). Returns (N,) int64."""
    keys, largest = prepared(codebook, _keys)
    query, slack = scaled_query(mean, precision, largest, prior_weight, keys.dtype)
    tokens = torch.empty(len(mean), dtype=torch.int64, device=mean.device)
    for begin in range(0, len(query), TOKENS_PER_BLOCK):
        part = slice(begin, begin + TOKENS_PER_BLOCK)
        # (n, groups): group g of a block has its codewords g, g + width, g + 2 width, …, so that the maximum runs along memory
        maxima = torch.cat(
            [(query[part] @ block.T).view(len(query[part]), GROUP, -1).amax(1) for block in keys.split(CODEWORDS_PER_BLOCK)], dim=1
        )
        threshold = maxima.amax(1).double() - 2 * slack[part]
        tokens[part] = _decide(mean[part], precision[part], codebook, prior_weight, (maxima >= threshold.unsqueeze(1)).nonzero())
    return tokens


def scaled_query(mean: Tensor, precision: Tensor, largest: Tensor, prior_weight: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One side of the product, (N, 2m), its largest element 1 (a factor per row changes no maximum), and what rounding may add.

    Args:
        largest: (2m,) float64, largest magnitude of each column of the other side.

    Returns:
        The query in `dtype`, and (N,) float64: a bound on the error of a product of it, conversion included, for any order of
        summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    query = torch.cat([mean * precision, (prior_weight - precision) / 2], dim=1)
    query = query / query.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    roundings = query.shape[1] + 4
    return query.to(dtype), query.abs() @ largest * (roundings * torch.finfo(dtype).eps) + torch.finfo(torch.float32).tiny


def _keys(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """[c, c^2] as (K, 2m), K filled up to whole groups, and the largest magnitude of each column."""
    codewords = codebook.double()
    # the first codeword again: it wins only where the true one, with a lower index, wins
    codewords = torch.cat([codewords, codewords[:1].expand(-len(codewords) % GROUP, -1)])
    keys = torch.cat([codewords, codewords.square()], dim=1)
    # where torch may round the factors of a float32 product to fewer bits, its error has no bound that serves
    exact = codebook.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return keys.to(torch.float32 if exact else torch.float64), keys.abs().amax(0)


def _decide(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, pairs: Tensor) -> Tensor:
    """The best codeword of the groups left over, in float64. pairs: (P, 2), token and group, by token. Returns (n,) int64."""
    size = len(codebook)
    best = torch.full((len(mean),), -torch.inf, dtype=torch.float64, device=mean.device)
    tokens = torch.full((len(mean),), size, dtype=torch.int64, device=mean.device)
    for token, group in (block.unbind(1) for block in pairs.split(PAIRS_PER_BLOCK)):
        groups_per_block = CODEWORDS_PER_BLOCK // GROUP
        start = group // groups_per_block * CODEWORDS_PER_BLOCK
        filled = size + -size % GROUP
        width = (filled - start).clamp_max(CODEWORDS_PER_BLOCK) // GROUP
        members = torch.arange(GROUP, device=mean.device)
        index = (start + group % groups_per_block).unsqueeze(1) + members * width.unsqueeze(1)  # (P, GROUP), ascending
        index = torch.where(index < size, index, 0)
        score = scores(mean[token].unsqueeze(1), precision[token].unsqueeze(1), codebook[index].double(), prior_weight)
        value = score.amax(1)
        where = torch.where(score == value.unsqueeze(1), index, size).amin(1)
        # a token's groups may lie in several blocks of pairs
        before = best.clone()
        best.scatter_reduce_(0, token, value, "amax")
        tokens[best > before] = size
        tokens.scatter_reduce_(0, token, torch.where(value == best[token], where, size), "amin")
    return tokens

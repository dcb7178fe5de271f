"""For graphs that leave this package (`torch.export`, ONNX): a float64 product names a few candidates, of which the score decides.

    blocks of posteriors --scan--> [mean / variance, (prior_weight - 1 / variance) / 2] . [c, c^2] -> the 8 largest -> the best by `score`

Nothing depends on a value, and a block's product is 8 MB whatever the number of posteriors. The product's terms cancel, but in float64 they
leave an error of about 1e-15 of their size: only of more than 8 codewords whose scores are so close may it lose the best.
"""

import torch
from torch import Tensor

from gq_lightning.quantizers.search.blocked import scores

SCORES_PER_BLOCK = 2**20
CANDIDATES = 8


def search(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """mean, precision: (N, m) float64; codebook (K, m). Returns (N,) int64."""
    from torch._higher_order_ops import scan  # with the compiler, which takes a second

    size, posteriors = len(codebook), mean.shape[0]
    codewords = codebook.double()
    keys = torch.cat([codewords, codewords.square()], dim=1).T
    block = max(1, SCORES_PER_BLOCK // size)
    # the last posterior fills the blocks up; there are two at least, as torch.export takes one to mean that there is always one
    rows = torch.arange((posteriors // block + 2) * block, device=mean.device).clamp(max=posteriors - 1).view(-1, block)

    def step(count: Tensor, posterior: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mean, precision = posterior
        query = torch.cat([mean * precision, (prior_weight - precision) / 2], dim=1)
        candidates = (query @ keys).topk(min(CANDIDATES, size), dim=1).indices
        return count + 1, best_of(mean, precision, codebook, prior_weight, candidates)

    _, tokens = scan(step, torch.zeros((), dtype=torch.int64, device=mean.device), (mean[rows], precision[rows]))
    return tokens.flatten()[torch.arange(posteriors, device=mean.device)]  # to slice would ask that there be enough of them


def best_of(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, candidates: Tensor) -> Tensor:
    """The best of a few candidates, ties to the lowest index. candidates: (N, n) int64. Returns (N,) int64."""
    score = scores(mean.unsqueeze(1), precision.unsqueeze(1), codebook[candidates].double(), prior_weight)
    winners = score == score.amax(1, keepdim=True)
    return torch.where(winners, candidates, candidates.new_full((), torch.iinfo(torch.int64).max)).amin(1)

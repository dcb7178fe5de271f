"""Search on a CPU with a compiler: byte tables bound the scores of 64 codewords at a time; only the few that remain are scored.

The codewords are sorted into 16 bins along each dimension, once. For a posterior, the smallest loss in each bin is rounded down to a
byte. The sum of a codeword's bytes bounds its loss, with one shuffle and one addition per dimension for 64 codewords. See table.cpp.
"""

import torch
from torch import Tensor

from gq_lightning.quantizers.search.compiled import call, library
from gq_lightning.quantizers.search.prepared import prepared

LANES, BINS = 64, 16
SAMPLE = 8192


def usable(device: torch.device, compile: bool) -> bool:
    """Whether `best` is available; with `compile`, it is compiled if it has not been, which takes a second."""
    return device.type == "cpu" and library("table", compile) is not None


def best(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, k: int) -> Tensor:
    """The k best, k at most K: (N, k) int64. mean, precision: (N, m) float64, contiguous; codebook (K, m)."""
    codewords, bins, low, high = prepared(codebook, _prepare)
    tokens = torch.empty(len(mean), k, dtype=torch.int64)
    size, m = codewords.shape
    book = (codewords, size, len(bins) * LANES, m, bins, low, high)
    call(_functions().gq_search, *book, mean, precision, float(prior_weight), len(mean), k, tokens, torch.get_num_threads())
    return tokens


def _prepare(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codewords in float64 (K, m), their bins (blocks of 64, m, 64), and the smallest and largest codeword of each bin (m, 16)."""
    codewords = codebook.double().contiguous()
    size, m = codewords.shape
    # approximate quantiles: any edges give a valid bound, and these the tightest
    sample = codewords[:: max(1, size // SAMPLE)].sort(dim=0).values
    edges = sample[torch.arange(1, BINS) * len(sample) // BINS].T.contiguous()
    bins = torch.empty(-(-size // LANES), m, LANES, dtype=torch.uint8)
    low, high = torch.empty(2, m, BINS, dtype=torch.float64).unbind()
    call(_functions().gq_prepare, codewords, size, len(bins) * LANES, m, edges, bins, low, high)
    return codewords, bins, low, high


def _functions():  # type: ignore[no-untyped-def]
    functions = library("table")
    assert functions is not None, "call usable() first"
    return functions

"""Search in one dimension: the codebook is sorted once, and a posterior needs log2 K comparisons.

If prior_weight * variance < 1, the score is a parabola that opens downwards, and the best codeword is one of the two next to its vertex
mean / (1 - prior_weight * variance). Otherwise it is the smallest or the largest codeword. All four are scored, which avoids the case
distinction, plus one more neighbour on each side, because the vertex is rounded. Uses C++ (bisection.cpp) if available.
"""

import torch
from torch import Tensor

from gq_lightning.quantizers.search.compiled import call, library
from gq_lightning.quantizers.search.prepared import prepared

# posteriors from which a second of compilation pays off
MANY = 2**16


def compiled_search(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float) -> tuple[Tensor, bool] | None:
    """The best codewords (N,) int64 for mean and variance (N, 1) of any floating-point type, unchecked, and codebook (K, 1), and whether
    all means are finite and all variances finite and positive; None if the C++ is not available."""
    functions = library("bisection", compile=len(mean) >= MANY) if mean.device.type == "cpu" else None
    if functions is None:
        return None
    wide = torch.promote_types(torch.promote_types(mean.dtype, variance.dtype), torch.float32)
    mean, variance = mean.to(wide).contiguous(), variance.to(wide).contiguous()
    values, indices, middles, starts, low, per_unit = prepared(codebook, _cells)
    tokens, valid = torch.empty(len(mean), dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    book = (values, indices, middles, starts, len(values), len(starts) - 1, low, per_unit)
    posteriors = (mean, variance, wide == torch.float64)
    call(functions.gq_bisect, *book, *posteriors, float(prior_weight), len(mean), tokens, valid, torch.get_num_threads())
    return tokens, bool(valid)


def search(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """The same in plain torch. mean, precision: (N, 1) float64; codebook (K, 1). Returns (N,) int64."""
    mean, precision = mean[:, 0], precision[:, 0]
    values, indices = prepared(codebook, _sort)
    vertex = mean * precision / (precision - prior_weight)
    # a degenerate parabola may give 0 / 0; the ends are scored anyway
    place = torch.searchsorted(values, vertex.nan_to_num_())
    last = len(values) - 1
    best = torch.full_like(mean, -torch.inf)
    tokens = torch.full_like(place, torch.iinfo(torch.int64).max)
    for candidate in (place - 2, place - 1, place, place + 1, torch.zeros_like(place), torch.full_like(place, last)):
        candidate = candidate.clamp_(0, last)
        value, index = values[candidate], indices[candidate]
        score = prior_weight * value.square() - (value - mean).square() * precision
        better = (score > best) | ((score == best) & (index < tokens))
        best, tokens = torch.where(better, score, best), torch.where(better, index, tokens)
    return tokens


def _sort(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values in ascending order, float64, and the lowest index of each."""
    values, order = codebook[:, 0].double().sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return values[first], order[first]


def _cells(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    """For the C++: `_sort`, the midpoints between values, how many lie before each cell of a grid, the grid's low end, cells per unit."""
    values, indices = _sort(codebook)
    # with twice as many cells as values, the fullest cells of a Gaussian codebook have about two midpoints
    low, width, cells = float(values[0]), float(values[-1] - values[0]), 2 * len(values)
    per_unit = cells / width if width > 0 else 0.0
    indices = indices.int()
    middles, starts = torch.empty(len(values) + 8), torch.empty(cells + 1, dtype=torch.int32)
    functions = library("bisection")
    assert functions is not None
    call(functions.gq_cells, values, len(values), cells, low, per_unit, indices, middles, starts)
    return values, indices, middles, starts, low, per_unit

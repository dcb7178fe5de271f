"""Search for the codeword that best fits a Gaussian posterior, https://arxiv.org/abs/2512.06609.

The score of codeword c under N(mean, variance), summed over the m dimensions, is

    log N(c | mean, variance) - prior_weight * log N(c | 0, 1)  =  1/2 sum [prior_weight c^2 - (c - mean)^2 / variance] + const

and every implementation returns its maximum in float64, with ties going to the lowest index:

    m = 1                     bisection: the codebook is sorted once
    CPU with AVX2, compiler   table: byte tables reject nearly all codewords; the rest are scored
    CUDA with Triton          fused: a product that stays on the chip; codewords near its maximum are scored
    anything else             blocked: the same in plain torch
    in an exported graph      portable: no choice depends on a value, no step on this package

`table` and `blocked` also find the k best, which refinement needs.
"""

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.quantizers.search import bisection, blocked, portable, table

# products (N K m) from which a second of compilation pays off
WORTH_COMPILING = 2**26


@torch.no_grad()
def best_codewords(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float = 1.0) -> Tensor:
    """The index of the highest score for each posterior; ties go to the lowest index.

    Tables derived from the codebook are cached while the codebook's tensor lives and does not change. Raises UserError if shapes, types or
    devices do not match, a value is not finite, or a variance is not positive.

    Args:
        mean: (N, m), any floating-point type and strides.
        variance: (N, m), positive.
        codebook: (K, m), finite, on the same device.
        prior_weight: weight of the prior's log-density in the score (omega). 0 gives the nearest codeword in the posterior's metric,
            1 the largest ratio of posterior to prior. If prior_weight * variance > 1, the score grows with the codeword's length.

    Returns:
        (N,) int64.
    """
    _check(mean, variance, codebook, prior_weight)
    if torch.compiler.is_exporting():
        return portable.search(mean.double(), variance.double().reciprocal(), codebook, prior_weight)
    return torch.ops.gq_lightning.best_codewords(mean, variance, codebook, prior_weight)


def _search(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    if len(mean) == 0:
        return torch.empty(0, dtype=torch.int64, device=mean.device)
    if codebook.shape[1] == 1 and (found := bisection.compiled_search(mean, variance, codebook, prior_weight)) is not None:
        tokens, valid = found
        _refuse_unless(valid)
        return tokens
    mean, precision = _prepared(mean, variance)
    if codebook.shape[1] == 1:
        return bisection.search(mean, precision, codebook, prior_weight)
    if mean.device.type == "cuda" and torch.version.cuda is not None and find_spec("triton") is not None:
        # imported late: Triton takes a second
        from gq_lightning.quantizers.search import fused

        return fused.search(mean, precision, codebook, prior_weight)
    return _best(mean, precision, codebook, prior_weight, 1)[:, 0]


# A torch operator, because a tracer cannot follow the dispatch, the C++ and the cache. `torch.compiler.disable` and
# `torch.library.custom_op` would also work, but they import the compiler, which takes nearly as long as torch.
_library = torch.library.Library("gq_lightning", "DEF")
_library.define("best_codewords(Tensor mean, Tensor variance, Tensor codebook, float prior_weight) -> Tensor")
_library.impl("best_codewords", _search, "CompositeExplicitAutograd")
torch.library.register_fake("gq_lightning::best_codewords", lambda mean, *_: mean.new_empty(len(mean), dtype=torch.int64), lib=_library)


@torch.no_grad()
def k_best_codewords(mean: Tensor, variance: Tensor, codebook: Tensor, k: int, prior_weight: float = 1.0) -> Tensor:
    """The indices (N, k) int64 of the k highest scores for each posterior, best first, starting with that of `best_codewords`; ties in
    index order.

    Arguments and errors are those of `best_codewords`, and k, from 1 to K.
    """
    _check(mean, variance, codebook, prior_weight)
    if not 1 <= k <= len(codebook):
        raise UserError(f"k: {k} of {len(codebook)} codewords: give a number from 1 to {len(codebook)}")
    if len(mean) == 0:
        return torch.empty(0, k, dtype=torch.int64, device=mean.device)
    return _best(*_prepared(mean, variance), codebook, prior_weight, k)


def _best(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float, k: int) -> Tensor:
    way = table if table.usable(mean.device, compile=mean.numel() * len(codebook) >= WORTH_COMPILING) else blocked
    return way.best(mean, precision, codebook, prior_weight, k)


def _prepared(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Means and precisions in float64, contiguous. Non-finite, zero and negative values are caught with one GPU synchronisation."""
    mean, precision = mean.double().contiguous(), variance.double().reciprocal().contiguous()
    _refuse_unless(bool((torch.isfinite(mean) & torch.isfinite(precision) & (precision > 0)).all().item()))
    return mean, precision


def _refuse_unless(valid: bool) -> None:
    if not valid:
        raise UserError("the encoder's features are not finite: means and variances must be finite, and variances positive")


def _check(mean: Tensor, variance: Tensor, codebook: Tensor, prior_weight: float) -> None:
    tensors = (mean, variance, codebook)
    if mean.shape != variance.shape or mean.ndim != 2 or codebook.ndim != 2 or mean.shape[1] != codebook.shape[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise UserError(f"mean, variance and codebook must be (N, m), (N, m) and (K, m), not {shapes}")
    if not codebook.numel():
        raise UserError(f"codebook {tuple(codebook.shape)} is empty: give at least one codeword of one dimension")
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise UserError(f"mean, variance and codebook must be floating point, not {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if len({tensor.device for tensor in tensors}) > 1:
        raise UserError(f"mean, variance and codebook must be on one device, not {', '.join(str(tensor.device) for tensor in tensors)}")
    if not math.isfinite(prior_weight) or prior_weight < 0:
        raise UserError(f"prior_weight {prior_weight}: give 0 or more")

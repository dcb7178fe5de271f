"""Search on CUDA by Triton: one kernel computes the product of `blocked` and keeps each group's maximum; another decides in float64.

Neither the N x K scores nor the candidates are written to memory. With TRITON_INTERPRET=1 both kernels run on a CPU, for tests.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_lightning.quantizers.search.blocked import scaled_query
from gq_lightning.quantizers.search.prepared import prepared

GROUP = 128
# maxima of this many tokens at a time: 65 536 codewords take 512 x 16 384 x 4 bytes
TOKENS_PER_BLOCK = 16384
# the product is computed as three of tf32, with 21 bits of the factors
BITS_LOST = 2**4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _maxima(
    query: Any,
    keys: Any,
    maxima: Any,
    tokens: Any,
    codewords: Any,
    groups: Any,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    left = tl.load(query + rows[:, None] * DEPTH + depth[None, :], mask=(rows < tokens)[:, None], other=0.0)
    first = tl.program_id(1) * GROUPS
    for group in range(first, min(first + GROUPS, groups)):
        columns = group * GROUP + tl.arange(0, GROUP)
        inside = columns < codewords
        right = tl.load(keys + columns[None, :] * DEPTH + depth[:, None], mask=inside[None, :], other=0.0)
        product = tl.dot(left, right, input_precision="tf32x3")
        product = tl.where(inside[None, :], product, float("-inf"))
        tl.store(maxima + rows * groups + group, tl.max(product, 1), mask=rows < tokens)


@triton.jit
def _decide(
    maxima: Any,
    thresholds: Any,
    mean: Any,
    precision: Any,
    codebook: Any,
    prior_weight: Any,
    tokens: Any,
    codewords: Any,
    groups: Any,
    DIMENSIONS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    threshold = tl.load(thresholds + row)
    omega = tl.load(prior_weight)  # a tensor, since a scalar argument would be float32
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int64)
    for group in range(groups):
        if tl.load(maxima + row.to(tl.int64) * groups + group) >= threshold:
            columns = group * GROUP + tl.arange(0, GROUP)
            inside = columns < codewords
            score = tl.zeros((GROUP,), tl.float64)
            for dimension in range(DIMENSIONS):
                codeword = tl.load(codebook + columns * DIMENSIONS + dimension, mask=inside, other=0.0).to(tl.float64)
                away = codeword - tl.load(mean + row * DIMENSIONS + dimension)
                score += omega * (codeword * codeword) - (away * away) * tl.load(precision + row * DIMENSIONS + dimension)
            score = tl.where(inside, score, float("-inf"))
            highest = tl.max(score, 0)
            lowest_index = tl.min(tl.where(score == highest, columns, codewords), 0).to(tl.int64)
            token = tl.where(highest > best, lowest_index, token)  # strictly: an earlier group keeps a tie
            best = tl.maximum(highest, best)
    tl.store(tokens + row, token)


if not INTERPRETED:
    _maxima = triton.autotune(
        [
            triton.Config({"TOKENS": tokens}, num_warps=warps, num_stages=stages)
            for tokens, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3))
        ],
        key=["DEPTH", "codewords"],
    )(_maxima)


def search(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """mean, precision: (N, m) float64; codebook (K, m). Returns (N,) int64."""
    keys, largest, codewords = prepared(codebook, _keys)
    size, dimensions = codewords.shape
    groups, depth = triton.cdiv(size, GROUP), keys.shape[1]
    query, slack = scaled_query(mean, precision, largest, prior_weight, torch.float32)
    query = torch.nn.functional.pad(query, (0, depth - query.shape[1])).contiguous()
    omega = torch.tensor([prior_weight], dtype=torch.float64, device=mean.device)
    tokens = torch.empty(len(mean), dtype=torch.int64, device=mean.device)
    for begin in range(0, len(mean), TOKENS_PER_BLOCK):
        part = slice(begin, begin + TOKENS_PER_BLOCK)
        n = len(mean[part])
        maxima = torch.empty(n, groups, device=mean.device)
        # for few tokens, more programs along the codebook
        groups_per_program = groups if n > 4096 else min(groups, 16)
        fixed = {"TOKENS": 16} if INTERPRETED else {}

        def grid(meta: dict[str, int], n: int = n, along: int = triton.cdiv(groups, groups_per_program)) -> tuple[int, int]:
            return triton.cdiv(n, meta["TOKENS"]), along

        _maxima[grid](query[part], keys, maxima, n, size, groups, DEPTH=depth, GROUP=GROUP, GROUPS=groups_per_program, **fixed)
        # float32, rounded down, so that the comparison in the kernel loses no group
        threshold = torch.nextafter((maxima.amax(1).double() - 2 * BITS_LOST * slack[part]).float(), query.new_full((), -torch.inf))
        _decide[(n,)](
            maxima,
            threshold,
            mean[part],
            precision[part],
            codewords,
            omega,
            tokens[part],
            size,
            groups,
            DIMENSIONS=dimensions,
            GROUP=GROUP,
        )
    return tokens


def _keys(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[c, c^2] in float32, padded with zeros to a depth that tl.dot accepts; its columns' largest magnitudes; the codewords."""
    keys = torch.cat([codebook.double(), codebook.double().square()], dim=1)
    depth = max(16, triton.next_power_of_2(keys.shape[1]))
    padded = torch.nn.functional.pad(keys.float(), (0, depth - keys.shape[1])).contiguous()
    return padded, keys.abs().amax(0), codebook.contiguous()

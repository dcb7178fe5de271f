"""Search on CUDA by Triton: one kernel computes the product of `blocked` and keeps each group's maximum; another decides in float64.

Neither the N x K scores nor the candidates are written to memory. With TRITON_INTERPRET=1 both kernels run on a CPU, for tests.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gq_lightning.quantizers.search import blocked
from gq_lightning.quantizers.search.blocked import scaled_query
from gq_lightning.quantizers.search.prepared import prepared

GROUP = 128
# maxima of this many tokens at a time: 65 536 codewords take 512 x 16 384 x 4 bytes
TOKENS_PER_BLOCK = 16384
# with more, the factors do not fit into the shared memory of a multiprocessor
MOST_DIMENSIONS = 32
# the product is computed as three of tf32, with 21 bits of the factors
BITS_LOST = 2**4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# tokens of a program, by depth: at 64, twice as many would not fit into 99 KiB of shared memory, which small GPUs have. The choice is
# fixed, because trying several takes seconds at a process's first search; of six, 128 was the fastest on an H200 for 65 536 posteriors
TOKENS = dict.fromkeys((16, 32, 64), 16) if INTERPRETED else {16: 128, 32: 128, 64: 64}
# enough for the multiprocessors of a large GPU
PROGRAMS = 1024
LOOKED_AT = 2 if INTERPRETED else 256


@triton.jit(do_not_specialize=["tokens", "codewords", "groups", "along"])
def _maxima(
    query: tl.tensor,
    keys: tl.tensor,
    maxima: tl.tensor,
    tokens: tl.tensor,
    codewords: tl.tensor,
    groups: tl.tensor,
    along: tl.tensor,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    left = tl.load(query + rows[:, None] * DEPTH + depth[None, :], mask=(rows < tokens)[:, None], other=0.0)
    first = tl.program_id(1) * along
    for group in range(first, min(first + along, groups)):
        columns = group * GROUP + tl.arange(0, GROUP)
        inside = columns < codewords
        right = tl.load(keys + columns[None, :] * DEPTH + depth[:, None], mask=inside[None, :], other=0.0)
        product = tl.dot(left, right, input_precision="tf32x3")
        product = tl.where(inside[None, :], product, float("-inf"))
        tl.store(maxima + rows * groups + group, tl.max(product, 1), mask=rows < tokens)


@triton.jit(do_not_specialize=["codewords", "groups"])
def _decide(
    maxima: tl.tensor,
    thresholds: tl.tensor,
    mean: tl.tensor,
    precision: tl.tensor,
    codebook: tl.tensor,
    prior_weight: tl.tensor,
    tokens: tl.tensor,
    codewords: tl.tensor,
    groups: tl.tensor,
    DIMENSIONS: tl.constexpr,
    GROUP: tl.constexpr,
    LOOKED_AT: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    threshold = tl.load(thresholds + row)
    omega = tl.load(prior_weight)  # a tensor, since a scalar argument would be float32
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int64)
    for first in range(0, groups, LOOKED_AT):
        every = first + tl.arange(0, LOOKED_AT)
        near = tl.load(maxima + row.to(tl.int64) * groups + every, mask=every < groups, other=float("-inf")) >= threshold
        for _ in range(tl.sum(near.to(tl.int32), 0)):
            group = tl.min(tl.where(near, every, groups), 0)
            near = near & (every != group)
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


def search(mean: Tensor, precision: Tensor, codebook: Tensor, prior_weight: float) -> Tensor:
    """mean, precision: (N, m) float64; codebook (K, m). Returns (N,) int64."""
    if codebook.shape[1] > MOST_DIMENSIONS:
        return blocked.best(mean, precision, codebook, prior_weight, 1)[:, 0]
    keys, largest = prepared(codebook, _keys)
    codewords = codebook.contiguous()
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
        rows = triton.cdiv(n, TOKENS[depth])
        along = triton.cdiv(groups, min(groups, triton.cdiv(PROGRAMS, rows)))
        grid = rows, triton.cdiv(groups, along)
        _maxima[grid](query[part], keys, maxima, n, size, groups, along, DEPTH=depth, GROUP=GROUP, TOKENS=TOKENS[depth], num_stages=2)
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
            LOOKED_AT=LOOKED_AT,
        )
    return tokens


def _keys(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """[c, c^2] in float32, padded with zeros to a depth that tl.dot accepts; and its columns' largest magnitudes. Not the codebook, which
    the cache would keep alive."""
    keys = torch.cat([codebook.double(), codebook.double().square()], dim=1)
    depth = max(16, triton.next_power_of_2(keys.shape[1]))
    padded = torch.nn.functional.pad(keys.float(), (0, depth - keys.shape[1])).contiguous()
    return padded, keys.abs().amax(0)

"""Gaussian codebooks, https://arxiv.org/abs/2512.06609: K vectors of m values from N(0, 1), fixed by a recipe.

A codebook is never trained and so never needs to be stored, only its recipe. But tokens outlive library versions, and a
generator that draws other numbers would silently turn all of them into noise. So the generators are ones whose streams are
specified, and whoever stores a recipe stores the `fingerprint` of what it gave, and compares.
"""

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from gq_lightning.errors import UserError

MOST_VALUES = 2**27
Generator = Literal["iid", "sobol", "quantile"]
Order = Literal["none", "tree"]


def gaussian_codebook(generator: Generator, size: int, dimensions: int, seed: int) -> Tensor:
    """The codebook (size, dimensions), float32, of a recipe.

    Args:
        generator: `iid` draws independent normals (the paper). `sobol` maps the first `size` points of a scrambled Sobol
            sequence, drawn in float32, through the inverse normal distribution function (the published models, with seed 42).
            `quantile` divides N(0, 1) into `size` bins of equal probability and takes the median of each, in ascending order; one
            dimension, and nothing random, so the seed does not matter.
        size: K, number of codewords.
        dimensions: m, values per codeword.
        seed: of the generator.

    Raises:
        UserError: an unknown generator, or a size or dimension that it cannot give.
    """
    check_codebook(size, dimensions)
    if generator == "iid":
        # numpy guarantees RandomState's stream for all versions to come (NEP 19); torch guarantees none
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((size, dimensions)).astype(np.float32))
    if generator == "sobol":
        if dimensions > SobolEngine.MAXDIM:
            raise UserError(f"codebook: sobol gives at most {SobolEngine.MAXDIM} dimensions, not {dimensions}; use iid")
        return _sobol(size, dimensions, seed)
    if generator == "quantile":
        if dimensions != 1:
            raise UserError(f"codebook: quantile has groups of 1 dimension, not {dimensions}; use iid, or one token per latent channel")
        centres = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size
        return torch.special.ndtri(centres).float().unsqueeze(1)
    raise UserError(f"codebook: {generator!r} is none of 'iid', 'sobol' and 'quantile'")


def check_codebook(size: int, dimensions: int) -> None:
    """Raises UserError unless there are 2 codewords or more, of one value or more, and 2^27 values at most (0.5 GB, seconds to draw)."""
    if size < 2 or dimensions < 1:
        raise UserError(f"codebook_size must be at least 2 and group_size at least 1, not {size} and {dimensions}")
    if size * dimensions > MOST_VALUES:
        raise UserError(f"codebook_size: {size} codewords of {dimensions} are more than 2^27 values: use a smaller codebook")


def ordered(codebook: Tensor, order: Order) -> Tensor:
    """The codewords (K, m) in an order of this recipe.

    Args:
        order: `none` leaves them as drawn. `tree` makes the bits of a token the way down a balanced binary tree: at each node the
            codewords are sorted along the axis of their largest variance (the first of equal ones, in float64) and halved. So the first
            k bits name one of 2^k cells of equal size, each smaller than the cell around it.

    Raises:
        UserError: an unknown order, or a tree over a number of codewords that is no power of two.
    """
    if order == "none":
        return codebook
    size = len(codebook)
    if order != "tree":
        raise UserError(f"order: {order!r} is neither 'none' nor 'tree'")
    if size & (size - 1):
        raise UserError(f"order: a tree needs a codebook_size that is a power of two, not {size}: use order none")
    values = codebook.double().numpy()
    cells = np.arange(size).reshape(1, size)
    while cells.shape[1] > 1:
        axis = values[cells].var(axis=1).argmax(axis=1)
        along = np.take_along_axis(values[cells], axis[:, None, None], axis=2).squeeze(2)
        cells = np.take_along_axis(cells, along.argsort(axis=1, kind="stable"), axis=1).reshape(2 * len(cells), -1)
    return codebook[torch.from_numpy(cells.ravel())]


def _sobol(size: int, dimensions: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.device("cpu"):
        uniform = SobolEngine(dimensions, scramble=True, seed=seed).draw(size, dtype=dtype).double()
    # Points are multiples of 2^-30, rounded to float32: 0 and 1 may occur, whose quantiles are infinite. The bounds move no other point,
    # and the published codebooks have neither.
    half_step = 2.0**-31
    return torch.special.ndtri(uniform.clamp(half_step, 1 - half_step)).float()


def fingerprint_of_float64_points(size: int, dimensions: int, seed: int) -> bytes:
    """The fingerprint of the `sobol` codebook of this recipe as earlier versions drew it."""
    return fingerprint(_sobol(size, dimensions, seed, torch.float64))


def fingerprint(codebook: Tensor) -> bytes:
    """SHA-256 (32 bytes) of a codebook's shape and its little-endian float32 values."""
    values = codebook.detach().cpu().numpy().astype("<f4")
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()

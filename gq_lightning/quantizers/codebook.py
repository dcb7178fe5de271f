"""Gaussian codebooks, https://arxiv.org/abs/2512.06609: K vectors of m values from N(0, 1), fixed by a recipe.

A codebook is never trained, so only its recipe is stored. But tokens outlive library versions, and a generator that draws other numbers
would silently turn them all into noise. So the generators have specified streams, and a recipe is stored together with the `fingerprint`
of its codebook, which is compared on loading.
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
    """The codebook (size, dimensions), float32, of a recipe. Raises UserError if the generator is unknown or does not support the size or
    the dimensions.

    Args:
        generator: `iid` draws independent normals (the paper). `sobol` maps the first `size` points of a scrambled Sobol
            sequence, drawn in float32, through the inverse normal distribution function (the published models, with seed 42).
            `quantile` divides N(0, 1) into `size` bins of equal probability and takes the median of each, in ascending order. It is
            limited to one dimension and ignores the seed.
        size: K, number of codewords.
        dimensions: m, values per codeword.
        seed: of the generator.
    """
    check_codebook(size, dimensions)
    if generator == "iid":
        # numpy guarantees RandomState's stream for all versions to come (NEP 19); torch guarantees none
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((size, dimensions)).astype(np.float32))
    if generator == "sobol":
        if dimensions > SobolEngine.MAXDIM:
            raise UserError(f"codebook: sobol has at most {SobolEngine.MAXDIM} dimensions, not {dimensions}; use iid")
        return _sobol(size, dimensions, seed)
    if generator == "quantile":
        if dimensions != 1:
            raise UserError(f"codebook: quantile has groups of 1 dimension, not {dimensions}; use iid, or one token per latent channel")
        centres = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size
        return torch.special.ndtri(centres).float().unsqueeze(1)
    raise UserError(f"codebook: {generator!r}: give 'iid', 'sobol' or 'quantile'")


def check_codebook(size: int, dimensions: int) -> None:
    """Raises UserError unless there are at least 2 codewords of at least one value, and at most 2^27 values (0.5 GB, seconds to draw)."""
    if size < 2 or dimensions < 1:
        raise UserError(f"codebook_size must be at least 2 and group_size at least 1, not {size} and {dimensions}")
    if size * dimensions > MOST_VALUES:
        raise UserError(f"codebook_size: {size} codewords of {dimensions} are more than 2^27 values: use a smaller codebook")


def ordered(codebook: Tensor, order: Order) -> Tensor:
    """The codewords (K, m), reordered. Raises UserError if the order is unknown, or a tree's number of codewords is not a power of two.

    Args:
        order: `none` keeps the order of the draw. `tree` makes the bits of a token the path down a balanced binary tree: at each node the
            codewords are sorted along the axis of largest variance (in float64; the first axis wins a tie) and halved. So the first k
            bits select one of 2^k cells of equal size, nested within each other.
    """
    if order == "none":
        return codebook
    size = len(codebook)
    if order != "tree":
        raise UserError(f"order: {order!r}: give 'none' or 'tree'")
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
    # The points are multiples of 2^-30, rounded to float32, so 0 and 1 may occur, whose quantiles are infinite. The clamp changes no other
    # point, and the published codebooks contain neither.
    half_step = 2.0**-31
    return torch.special.ndtri(uniform.clamp(half_step, 1 - half_step)).float()


def fingerprint_of_float64_points(size: int, dimensions: int, seed: int) -> bytes:
    """The fingerprint of the `sobol` codebook that earlier versions drew for this recipe."""
    return fingerprint(_sobol(size, dimensions, seed, torch.float64))


def fingerprint(codebook: Tensor) -> bytes:
    """SHA-256 (32 bytes) of a codebook's shape and its little-endian float32 values."""
    values = codebook.detach().cpu().numpy().astype("<f4")
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()

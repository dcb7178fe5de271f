"""Refinement of tokens: from each token's best codewords, choose the one whose decoded image is nearest to the original.

    candidates (B,h,w,n,k) --token by token: decode all k, keep the best--> tokens (B,h,w,n)

The posterior scores a codeword in the latent space, which only approximates its effect on the decoded image. This module decodes
instead. It is coordinate descent without any training. Tokens whose regions of the image do not overlap are tried together, each
scored on its own region. The size of a region is measured, since it depends on attention, normalisation and windows. A step is kept
only if the whole image improves, so leakage out of a region cannot make an image worse.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor], Tensor]

CANDIDATES = 16
# share of a change, in squared error, that may lie outside the region that scores it
LEAK = 0.05
# decoded at once
MOST_PIXELS = 2**20


def squared_error(pictures: Tensor, targets: Tensor) -> Tensor:
    """Squared error summed over pixels and channels, from two tensors (B, C, H, W) to (B,)."""
    return (pictures - targets).square().sum((1, 2, 3))


def refine(
    decode: Callable[[Tensor], Tensor], images: Tensor, candidates: Tensor, passes: int = 1, distance: Distance = squared_error
) -> tuple[Tensor, Tensor]:
    """Coordinate descent from the first candidates (B, h, w, n, k) int64, best first; a pass visits every token once.

    Args:
        decode: tokens (B, h, w, n) to images (B, 3, H, W).
        passes: the most passes; it stops early when a pass changes nothing.
        distance: the distance to minimise, from images (b, 3, a, c) and originals to (b,), of whole images and of regions.

    Returns:
        Tokens (B, h, w, n), whose images are no further from the originals than those of the first candidates; and the distances (B,).
    """
    height, width, slots = candidates.shape[1:4]
    cell = images.shape[2] // height
    tokens = candidates[..., 0].clone()
    least = distance(decode(tokens), images)
    spacing = field_of_view(decode, candidates)
    share = max(1, MOST_PIXELS // images[:, 0].numel())
    for _ in range(passes):
        before = tokens.clone()
        for row, column, slot in product(range(min(spacing, height)), range(min(spacing, width)), range(slots)):
            own = (slice(None), slice(row, None, spacing), slice(column, None, spacing), slot)
            costs, options = [], candidates[own].movedim(-1, 0)  # (k, B, rows, columns)
            originals = _regions(images, row, column, spacing, cell)
            for chunk in options.split(share):
                trials = tokens.repeat(len(chunk), 1, 1, 1)
                trials[own] = chunk.flatten(0, 1)
                regions = _regions(decode(trials), row, column, spacing, cell)
                costs.append(distance(regions, originals.repeat(len(chunk), 1, 1, 1)).view(chunk.shape))
            chosen = options.gather(0, torch.cat(costs).argmin(0, keepdim=True))[0]
            if torch.equal(chosen, tokens[own]):
                continue
            trial = tokens.clone()
            trial[own] = chosen
            found = distance(decode(trial), images)
            better = found < least
            tokens[better], least[better] = trial[better], found[better]
        if torch.equal(tokens, before):
            break
    return tokens, least


def field_of_view(decode: Callable[[Tensor], Tensor], candidates: Tensor) -> int:
    """Side, in positions, of the square around a token that contains all but `LEAK` of the change when the token changes.

    Measured at the centre of the images, with the worst candidate in place of the best.
    """
    _, height, width = candidates.shape[:3]
    row, column = height // 2, width // 2
    tokens = candidates[..., 0]
    changed = tokens.clone()
    changed[:, row, column] = candidates[:, row, column, :, -1]
    change = (decode(changed) - decode(tokens)).square().sum((0, 1))
    change = change.unflatten(0, (height, -1)).unflatten(2, (width, -1)).sum((1, 3))  # (h, w)
    for side in range(1, max(height, width)):
        top, left = row - side // 2, column - side // 2
        if change[max(top, 0) : top + side, max(left, 0) : left + side].sum() >= (1 - LEAK) * change.sum():
            return side
    return max(height, width)


def _regions(pictures: Tensor, row: int, column: int, spacing: int, cell: int) -> Tensor:
    """The squares of `spacing` positions, of `cell` pixels a side each, around the positions row, row + spacing, …, column, column +
    spacing, …

    Zero beyond the edges of the pictures (B, C, H, W). If a square would exceed an axis, it spans the whole axis. Returns (B * rows *
    columns, C, side, side), in this order.
    """
    side = spacing * cell
    for axis, first in ((2, row), (3, column)):
        length = pictures.shape[axis]
        if side >= length:
            pictures = pictures.unfold(axis, length, length)
            continue
        begin = (first - spacing // 2) * cell + side
        count = len(range(first, length // cell, spacing))
        padding = [0, 0] * (pictures.ndim - axis - 1) + [side, side]
        padded = functional.pad(pictures, padding).narrow(axis, begin, count * side)
        pictures = padded.unfold(axis, side, side)
    return pictures.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

"""Applies a function that takes small maps to large ones: cut into overlapping windows, apply, blend.

    x (B, C, H, W) --cut--> windows (b, C, wh, ww) --function--> (b, C2, wh * s, ww * s) --blend--> (B, C2, H * s, W * s)

with s = scale_out / scale_in: the encoder has scale_in = downsampling and scale_out = 1, the decoder the reverse. This serves
backbones with a fixed image size and images too large for memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gq_lightning.construction import Size, sides
from gq_lightning.errors import UserError

WINDOWS_PER_BATCH = 16


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Positions of the windows that cover [0, length): `window - overlap` apart, the last one flush with the end."""
    last = length - window
    return [*range(0, last, max(window - overlap, 1)), last]


def see_in_windows(
    function: Callable[[Tensor], Tensor], x: Tensor, scale_in: int, scale_out: int, window: Size | None, tile: int | None
) -> Tensor:
    """`function` applied to `x` (B, C, H, W) at once if it can be, else in windows that overlap by a quarter, which hides the seams. Raises
    UserError if `tile` is not a multiple of the downsampling, or the image is smaller than `window`.

    Args:
        scale_in, scale_out: elements of `x` and of the result per position of the token grid; one is 1, the other is the downsampling.
        window: the only size, in pixels, that `function` accepts, or None if it accepts any.
        tile: the largest size, in pixels, to process at once; None sets no limit.
    """
    if x.shape[0] == 0:  # an empty batch still needs the output's shape; `len` would fix the size of an exported batch
        return see_in_windows(function, x.new_zeros(1, *x.shape[1:]), scale_in, scale_out, window, tile)[:0]
    downsampling = max(scale_in, scale_out)
    if tile is not None and (tile < 4 * downsampling or tile % downsampling):
        raise UserError(f"tile: {tile}: give a multiple of {downsampling} of at least {4 * downsampling} pixels")
    if (size := window or tile) is None:
        return function(x)
    (height, width), (rows, columns) = (length // scale_in for length in x.shape[-2:]), (side // downsampling for side in sides(size))
    if window is None and height <= rows and width <= columns:
        return function(x)
    if window and (height < rows or width < columns):
        given, needed = (f"{rows * downsampling}x{columns * downsampling}" for rows, columns in ((height, width), (rows, columns)))
        raise UserError(f"pictures of {given} are smaller than the backbone's {needed} pixels: pad them first")
    overlap = [min(side // 4, min(height, width) - 1) * scale_in for side in (rows, columns)]
    covered = (min(rows, height) * scale_in, min(columns, width) * scale_in)
    return apply_in_windows(function, x, covered, (overlap[0], overlap[1]), scale_in, scale_out, WINDOWS_PER_BATCH)


def apply_in_windows(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    window: tuple[int, int],
    overlap: Size,
    scale_in: int = 1,
    scale_out: int = 1,
    batch_size: int = 1,
) -> Tensor:
    """`function` applied to `x` (B, C, H, W) window by window, blended by linear ramps where windows overlap.

    Every image is processed separately, so that its result is independent of the rest of the batch to the bit. If one window covers `x`,
    the result is `function(x)`, whatever `batch_size` is.

    Args:
        function: (b, C, wh, ww) to (b, C2, wh * s, ww * s), s = scale_out / scale_in.
        window: height and width of a window, in elements of `x`; like H, W and `overlap` multiples of `scale_in`.
        overlap: smallest overlap of neighbouring windows, in elements of `x`, along both axes or along each.
        batch_size: windows in one call of `function`.
    """
    height, width = x.shape[-2:]
    overlaps = sides(overlap)
    rows, columns = starts(height, window[0], overlaps[0]), starts(width, window[1], overlaps[1])
    if len(rows) == len(columns) == 1:
        return function(x)

    def scaled(length: int) -> int:
        return length // scale_in * scale_out

    wide = torch.promote_types(x.dtype, torch.float32)  # sums in half precision would lose bits
    row_weights = _weights([scaled(row) for row in rows], scaled(window[0])).to(x.device, wide)
    column_weights = _weights([scaled(column) for column in columns], scaled(window[1])).to(x.device, wide)
    cells = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    results = []
    for picture in x:
        canvas: Tensor | None = None
        for chunk in (cells[first : first + batch_size] for first in range(0, len(cells), batch_size)):
            crops = [picture[:, rows[i] : rows[i] + window[0], columns[j] : columns[j] + window[1]] for i, j in chunk]
            outputs = function(torch.stack(crops))
            if canvas is None:
                canvas = outputs.new_zeros(outputs.shape[1], scaled(height), scaled(width), dtype=wide)
            for (i, j), output in zip(chunk, outputs, strict=True):
                top, left = scaled(rows[i]), scaled(columns[j])
                weight = row_weights[i][:, None] * column_weights[j]
                canvas[:, top : top + output.shape[1], left : left + output.shape[2]] += output * weight
        assert canvas is not None
        results.append(canvas.to(outputs.dtype))
    return torch.stack(results)


def _weights(positions: list[int], window: int) -> Tensor:
    """Blending weights (len(positions), window) along one axis, float64, that sum to 1 at every element of the axis.

    Each window rises linearly over its overlap with the previous one and falls over its overlap with the next, so that two ramps sum to
    1. Near the end three windows can overlap, because the last one is shifted back; dividing by the sum handles that.
    """
    weights = torch.ones(len(positions), window, dtype=torch.float64)
    for index in range(len(positions) - 1):
        shared = positions[index] + window - positions[index + 1]
        if shared:
            ramp = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
            weights[index, -shared:] *= 1 - ramp
            weights[index + 1, :shared] *= ramp
    total = torch.zeros(positions[-1] + window, dtype=torch.float64)
    for position, weight in zip(positions, weights, strict=True):
        total[position : position + window] += weight
    return torch.stack([weight / total[position : position + window] for position, weight in zip(positions, weights, strict=True)])

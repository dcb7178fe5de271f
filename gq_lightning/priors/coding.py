"""Token files coded with a prior's probabilities.

grid (h, w, n) --windows of the prior's grid--> symbols --frequencies of the prior, integers--> rANS --> bytes

A grid larger than the prior's is divided into windows. Where its size is no multiple, the last windows overlap earlier ones, whose tokens
they are given. Encoder and decoder call the transformer in exactly the same way, position by position, so that they compute the same
numbers on one machine. In float64 other machines mostly do, too; where not, the file's checksum of the tokens causes an error.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.priors.module import Prior
from gq_lightning.tokens.entropy_coding import MOST_POINTS, Interval, Reader, Table, packed

TOGETHER = 64  # windows, to bound memory
Corner = tuple[int, int]


class PriorCoder:
    """Codes grids of tokens with a prior, without a class. See `token_file.Prior`. Raises UserError if the prior's vocabulary is too
    large."""

    def __init__(self, prior: Prior) -> None:
        if 2 * prior.spelling.base > MOST_POINTS:
            raise UserError(f"--prior: a vocabulary of {prior.spelling.base} cannot be coded: train one with largest_vocabulary 256")
        self.fingerprint = prior.fingerprint
        self.prior = copy.deepcopy(prior).to("cpu", torch.float64).eval()
        self.points = min(MOST_POINTS, 1024 * prior.spelling.base)

    def encode(self, grid: NDArray[np.int64]) -> bytes:
        intervals: list[Interval] = []

        def write(tables: list[Table], wanted: list[int]) -> list[int]:
            intervals.extend(table.interval(symbol) for table, symbol in zip(tables, wanted, strict=True))
            return wanted

        self._walk(grid.copy(), write)
        return packed(intervals)

    def decode(self, data: bytes, shape: tuple[int, int, int]) -> NDArray[np.int64]:
        reader = Reader(data)
        return self._walk(np.zeros(shape, dtype=np.int64), lambda tables, _: [reader.read(table) for table in tables])

    @torch.no_grad()
    def _walk(self, grid: NDArray[np.int64], code: Callable[[list[Table], list[int]], list[int]]) -> NDArray[np.int64]:
        """Goes through the symbols of a grid in the order of the file; `code` maps the tables of some symbols and the symbols in `grid` to
        symbols, of which the returned grid is made. To decode, `grid` is zeros."""
        prior = self.prior
        height, width, n = prior.grid
        if grid.shape[2] != n or grid.shape[0] < height or grid.shape[1] < width:
            found, least = " x ".join(map(str, grid.shape)), " x ".join(map(str, prior.grid))
            raise UserError(f"tokens of {found}, but the prior codes {least} or more positions: use a larger picture, or no --prior")
        known = np.zeros(grid.shape[:2], dtype=bool)
        for corners in windows(grid.shape[:2], (height, width)):
            top, left = corners[0]
            given = known[top : top + height, left : left + width].flatten()  # equal for all of these windows
            for begin in range(0, len(corners), TOGETHER):
                parts = [grid[y : y + height, x : x + width] for y, x in corners[begin : begin + TOGETHER]]
                symbols = prior.split(torch.from_numpy(np.stack(parts)))
                for part, tokens in zip(parts, prior.join(self._windows(symbols, given, code)).numpy(), strict=True):
                    part[:] = tokens
            for y, x in corners:
                known[y : y + height, x : x + width] = True
        return grid

    def _windows(self, symbols: Tensor, given: NDArray[np.bool_], code: Callable[[list[Table], list[int]], list[int]]) -> Tensor:
        """Codes the symbols (B, h * w, n * digits) of windows; returns what `code` returns, and the symbols at `given` positions."""
        prior, labels = self.prior, torch.full((len(symbols),), -1)
        symbols, (body, _) = symbols.clone(), prior.caches()
        for position in range(prior.positions):
            context = prior.context(symbols[:, max(position - 1, 0) : position], labels, body)[:, -1]
            if given[position]:
                continue
            head = prior.caches()[1]
            for place in range(prior.symbols):
                logits = prior.follow(context, symbols[:, position, max(place - 1, 0) : place], head)[:, -1]
                tables = [Table(row) for row in self._frequencies(logits)]
                symbols[:, position, place] = torch.tensor(code(tables, symbols[:, position, place].tolist()))
        return symbols

    def _frequencies(self, logits: Tensor) -> NDArray[np.int64]:
        """Integers (B, base) in proportion to the probabilities, each at least 1, with sums of at most `points`."""
        shares = logits.double().softmax(-1) * (self.points - logits.shape[-1])
        return 1 + shares.long().numpy()


def windows(size: tuple[int, int], window: tuple[int, int]) -> Iterator[Sequence[Corner]]:
    """The upper left corners of the windows that cover a grid, in up to four groups: those side by side from the upper left, those at the
    right edge, at the lower edge, and in the corner. The windows of a group do not overlap, and overlap earlier groups in the same way."""
    regular = [range(0, length - side + 1, side) for length, side in zip(size, window, strict=True)]
    last = [[length - side] if length % side else [] for length, side in zip(size, window, strict=True)]
    for rows, columns in ((regular[0], regular[1]), (regular[0], last[1]), (last[0], regular[1]), (last[0], last[1])):
        if corners := list(product(rows, columns)):
            yield corners

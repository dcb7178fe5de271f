"""Tokens to the bytes that a model says they are worth, and back, exactly on any machine: all is integers.

    tokens, one after the other --Model: an interval of integers each--> rANS (constriction) --> bytes

A model gives every token a share of `total` points, `start` to `start + frequency`, from the tokens before it alone, so that who decodes
has the same shares. The coder is a stack (an asymmetric numeral system). To code a token, one of its points is pushed; which one, is popped
off the stack before, so that the bits of this choice come back. Uniform distributions are all that this takes; nothing is rounded.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# the coder has 24 bits for a distribution: of 2^20 points each has 16 of its steps at least, and wastes less than a tenth of a bit
MOST_POINTS = 2**20

Tables = Callable[[Sequence[int]], NDArray[np.integer]]
Interval = tuple[int, int, int]


class Model(Protocol):
    """What the next token may be, given those that were seen."""

    def interval(self, token: int) -> Interval:
        """start, frequency (1 or more) and total (at most `MOST_POINTS`) of a token."""

    def token(self, point: Callable[[int], int]) -> int:
        """The token in whose interval the point is; `point` gives it for a total."""

    def see(self, token: int) -> None:
        """The next token was this one."""


class Counts:
    """Order 0, adaptive: each of `size` tokens counts once at the start, and `weight` times more whenever it has been seen.

    With weight 0 all tokens stay equal. The counts stand still once their total would be more than `MOST_POINTS`.
    """

    def __init__(self, size: int, weight: int) -> None:
        self.size, self.weight = size, weight
        self.seen: list[int] = []  # in ascending order

    def interval(self, token: int) -> Interval:
        below = bisect_left(self.seen, token)
        count = bisect_right(self.seen, token, below) - below
        return token + self.weight * below, 1 + self.weight * count, self.size + self.weight * len(self.seen)

    def token(self, point: Callable[[int], int]) -> int:
        drawn = point(self.size + self.weight * len(self.seen))
        # the last token that begins at or before the point
        return bisect_right(range(self.size), drawn, key=lambda token: self.interval(token)[0]) - 1

    def see(self, token: int) -> None:
        if self.weight and self.size + self.weight * (len(self.seen) + 1) <= MOST_POINTS:
            insort(self.seen, token)


class ByTables:
    """Frequencies from a function of all tokens before: a prior's probabilities, quantised to integers.

    Args:
        tables: tokens before to the frequencies of the next, (K,) integers of 1 or more whose sum is at most `MOST_POINTS`.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.before: list[int] = []
        self._starts: NDArray[np.int64] | None = None

    def interval(self, token: int) -> Interval:
        starts = self._known()
        return int(starts[token]), int(starts[token + 1] - starts[token]), int(starts[-1])

    def token(self, point: Callable[[int], int]) -> int:
        starts = self._known()
        return int(np.searchsorted(starts, point(int(starts[-1])), side="right")) - 1

    def see(self, token: int) -> None:
        self.before.append(token)
        self._starts = None

    def _known(self) -> NDArray[np.int64]:
        if self._starts is None:
            frequencies = np.asarray(self.tables(self.before))
            if not np.issubdtype(frequencies.dtype, np.integer) or frequencies.min() < 1 or frequencies.sum() > MOST_POINTS:
                raise ValueError(f"frequencies must be integers of 1 or more whose sum is at most {MOST_POINTS}")
            self._starts = np.concatenate([[0], frequencies.astype(np.int64).cumsum()])
        return self._starts


def encode(tokens: Sequence[int], models: Sequence[Model]) -> bytes:
    """Codes tokens; token i by models[i % len(models)], each of which sees its own."""
    import constriction

    uniform = constriction.stream.model.Uniform

    intervals = []
    for index, token in enumerate(tokens):
        model = models[index % len(models)]
        intervals.append(model.interval(token))
        model.see(token)
    coder = constriction.stream.stack.AnsCoder()
    for start, frequency, total in reversed(intervals):  # the last one pushed is the first one popped
        offset = int(coder.decode(uniform(frequency))) if frequency > 1 else 0
        if total > 1:
            coder.encode_reverse(start + offset, uniform(total))
    return np.asarray(coder.get_compressed(), dtype="<u4").tobytes()


def decode(data: bytes, count: int, models: Sequence[Model]) -> list[int]:
    """The inverse, `models` being as they were at the beginning. From other data come other tokens, or ValueError."""
    import constriction

    uniform = constriction.stream.model.Uniform

    coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
    tokens = []
    for index in range(count):
        model, drawn = models[index % len(models)], 0

        def point(total: int) -> int:
            nonlocal drawn
            drawn = int(coder.decode(uniform(total))) if total > 1 else 0
            return drawn

        token = model.token(point)
        start, frequency, _ = model.interval(token)
        if frequency > 1:
            coder.encode_reverse(drawn - start, uniform(frequency))
        model.see(token)
        tokens.append(token)
    return tokens


def adaptive_bits(tokens: NDArray[np.int64], size: int, weight: int) -> float:
    """What `Counts` takes for tokens, without coding them."""
    order = tokens.argsort(kind="stable")
    ordered = tokens[order]
    first = np.searchsorted(ordered, ordered)
    count = np.empty(len(tokens), dtype=np.int64)
    count[order] = np.arange(len(tokens)) - first  # how often it was seen before
    return float(np.log2((size + weight * np.arange(len(tokens))) / (1 + weight * count)).sum())

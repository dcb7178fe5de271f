"""Entropy coding of tokens with a model. It uses integers only, so every machine decodes the same tokens.

    tokens, one after the other --Model: an interval of integers each--> rANS (constriction) --> bytes

From the previous tokens, a model assigns each possible token an interval of `total` points, `start` to `start + frequency`, which the
decoder can reproduce. The coder is a stack (an asymmetric numeral system). A token is coded by pushing one of its points. The choice of
the point is popped off the stack first, so that its bits are recovered. Only uniform distributions are needed, and nothing is rounded.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# the coder has 24 bits for a distribution, so each of 2^20 points has at least 16 steps, which wastes less than a tenth of a bit
MOST_POINTS = 2**20

Interval = tuple[int, int, int]  # start, frequency (1 or more) and total (at most MOST_POINTS) of a token


class Counts:
    """Adaptive order-0 model: each of `size` tokens starts with a count of one and gains `weight` for each occurrence.

    With weight 0 all tokens stay equally likely. The counts stop changing when their total would exceed `MOST_POINTS`. Raises ValueError
    if `size` exceeds it already.

    The sums of counts are a binary indexed tree (Fenwick 1994), so a token takes the same few microseconds whether a thousand or a million
    came before. `token` returns that whose interval contains the point which `point(total)` draws.
    """

    def __init__(self, size: int, weight: int) -> None:
        if not 1 <= size <= MOST_POINTS:
            raise ValueError(f"counts of {size} tokens: 1 to {MOST_POINTS} can be coded")
        self.size, self.weight, self.total = size, weight, size
        self._seen: dict[int, int] = {}  # occurrences of a token
        self._sums: dict[int, int] = {}  # of the tokens [node - (node & -node), node)

    def interval(self, token: int) -> Interval:
        below, node, sums = 0, token, self._sums
        while node:
            below += sums.get(node, 0)
            node &= node - 1
        return token + self.weight * below, 1 + self.weight * self._seen.get(token, 0), self.total

    def token(self, point: Callable[[int], int]) -> int:
        drawn, sums = point(self.total), self._sums
        token = below = 0
        step = 1 << self.size.bit_length()
        while step := step >> 1:  # to the last token whose interval starts at or before the point
            if (node := token + step) <= self.size:
                more = below + sums.get(node, 0)
                if node + self.weight * more <= drawn:
                    token, below = node, more
        return token

    def see(self, token: int) -> None:
        if not self.weight or self.total + self.weight > MOST_POINTS:
            return
        self.total += self.weight
        self._seen[token] = self._seen.get(token, 0) + 1
        node = token + 1
        while node <= self.size:
            self._sums[node] = self._sums.get(node, 0) + 1
            node += node & -node


class Table:
    """The distribution of one token by frequencies: (K,) integers of at least 1 with a sum of at most `MOST_POINTS`, else ValueError."""

    def __init__(self, frequencies: NDArray[np.integer]) -> None:
        if not np.issubdtype(frequencies.dtype, np.integer) or frequencies.min() < 1 or frequencies.sum() > MOST_POINTS:
            raise ValueError(f"frequencies must be integers of 1 or more whose sum is at most {MOST_POINTS}")
        self._starts = np.concatenate([[0], frequencies.astype(np.int64).cumsum()])

    def interval(self, token: int) -> Interval:
        return int(self._starts[token]), int(self._starts[token + 1] - self._starts[token]), int(self._starts[-1])

    def token(self, point: Callable[[int], int]) -> int:
        return int(np.searchsorted(self._starts, point(int(self._starts[-1])), side="right")) - 1


def encode(tokens: Sequence[int], models: Sequence[Counts]) -> bytes:
    """Codes tokens; models[i % len(models)] codes token i, and each model sees only its own tokens."""
    intervals = []
    for index, token in enumerate(tokens):
        model = models[index % len(models)]
        intervals.append(model.interval(token))
        model.see(token)
    return packed(intervals)


def decode(data: bytes, count: int, models: Sequence[Counts]) -> list[int]:
    """The inverse of `encode`, with `models` in their initial state. Other data give other tokens, or ValueError."""
    reader, tokens = Reader(data), []
    for index in range(count):
        model = models[index % len(models)]
        tokens.append(reader.read(model))
        model.see(tokens[-1])
    return tokens


def packed(intervals: Sequence[Interval]) -> bytes:
    """The bytes of tokens given by their intervals."""
    import constriction

    uniform = constriction.stream.model.Uniform
    coder = constriction.stream.stack.AnsCoder()
    for start, frequency, total in reversed(intervals):  # the last token pushed is the first popped
        offset = int(coder.decode(uniform(frequency))) if frequency > 1 else 0
        if total > 1:
            coder.encode_reverse(start + offset, uniform(total))
    return np.asarray(coder.get_compressed(), dtype="<u4").tobytes()


class Reader:
    """The inverse of `packed`: reads one token after the other, each by its distribution. Other data give other tokens, or ValueError."""

    def __init__(self, data: bytes) -> None:
        import constriction

        self._uniform = constriction.stream.model.Uniform
        self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))

    def read(self, distribution: Counts | Table) -> int:
        drawn = 0

        def point(total: int) -> int:
            nonlocal drawn
            drawn = int(self._coder.decode(self._uniform(total))) if total > 1 else 0
            return drawn

        token = distribution.token(point)
        start, frequency, _ = distribution.interval(token)
        if frequency > 1:
            self._coder.encode_reverse(drawn - start, self._uniform(frequency))
        return token


def adaptive_bits(tokens: NDArray[np.int64], size: int, weight: int) -> float:
    """The number of bits that `Counts` needs for tokens, without coding them."""
    order = tokens.argsort(kind="stable")
    ordered = tokens[order]
    first = np.searchsorted(ordered, ordered)
    count = np.empty(len(tokens), dtype=np.int64)
    count[order] = np.arange(len(tokens)) - first  # earlier occurrences of each token
    return float(np.log2((size + weight * np.arange(len(tokens))) / (1 + weight * count)).sum())

"""Token files that are coded: round trips to the bit, what damage gives, and a prior's probabilities."""

import random
import struct
import time
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gq_lightning.errors import UserError
from gq_lightning.tokens.entropy_coding import MOST_POINTS, Counts, Reader, Table, adaptive_bits, decode, encode, packed
from gq_lightning.tokens.token_file import _GEOMETRY, MAGIC, TokenFile, from_bytes, read_tokens, to_bytes, write_tokens


def grid(generator: random.Random) -> TokenFile:
    """Of any size, codebook and skew: from one token alone to uniform ones."""
    size = generator.choice([1, 2, 3, 16, 255, 256, 4096, 64000, 65536, 2**20, 2**31])
    shape = [generator.randrange(1, 9), generator.randrange(1, 9), generator.choice([1, 1, 2, 4])]
    used = min(size, generator.choice([1, 3, 100, 2**31]))
    tokens = torch.tensor([generator.randrange(used) * (size // used) for _ in range(int(np.prod(shape)))]).view(shape)
    return TokenFile(tokens, shape[0] * 8 - generator.randrange(8), shape[1] * 8, "éa" * generator.randrange(3), "ab" * 32, size, 8)


def same(one: TokenFile, other: TokenFile) -> bool:
    return torch.equal(one.tokens, other.tokens) and one.__dict__ | {"tokens": 0} == other.__dict__ | {"tokens": 0}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_grids_come_back_and_mutated_files_do_not(count: int) -> None:
    generator = random.Random(count)
    coded = 0
    for _ in range(count):
        written = grid(generator)
        data = to_bytes(written)
        assert same(from_bytes(data), written) and to_bytes(written) == data
        coded += data[5] > 0
        at = generator.randrange(len(data))
        mutated = generator.choice(
            [
                data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :],
                data[:at] + generator.randbytes(8) + data[at + 8 :],
                data[:at],
                data + generator.randbytes(1),
                data[:at] + data[at + 1 :],
            ]
        )
        if mutated != data:
            with pytest.raises((UserError, ValueError)):
                from_bytes(mutated)
    assert 0.1 * count < coded < 0.9 * count, "both codings are tried"


def test_a_coded_file_is_smaller_where_tokens_repeat_and_never_larger(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    fixed = 72 + 1024 * 2
    sizes = {}
    for name, tokens in {
        "one": torch.full((32, 32, 1), 40000),
        "few": torch.randint(0, 50, (32, 32, 1), generator=generator) * 1000,
        "all": torch.randint(0, 65536, (32, 32, 1), generator=generator),
    }.items():
        write_tokens(tmp_path / name, TokenFile(tokens, 256, 256, "", "f" * 64, 65536, 8))
        assert torch.equal(read_tokens(tmp_path / name).tokens, tokens)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["one"] < 72 + 60 and sizes["few"] < 72 + 1024 and sizes["all"] == fixed


@pytest.mark.parametrize("weight", [0, 1, 64])
def test_counts_cost_what_they_say(weight: int) -> None:
    tokens = np.random.RandomState(0).randint(0, 30, 2000)
    data = encode(tokens.tolist(), [Counts(300, weight)])
    assert abs(8 * len(data) - adaptive_bits(tokens, 300, weight)) < 0.02 * 8 * len(data) + 64
    assert decode(data, len(tokens), [Counts(300, weight)]) == tokens.tolist()


def test_counts_stand_still_before_they_are_too_many() -> None:
    model = Counts(2, MOST_POINTS // 4)
    for token in (0, 1, 1, 1, 1, 1):
        start, frequency, total = model.interval(token)
        assert 0 <= start < start + frequency <= total <= MOST_POINTS
        model.see(token)
    tokens = [0, 1] * 100
    assert decode(encode(tokens, [Counts(2, MOST_POINTS // 4)]), 200, [Counts(2, MOST_POINTS // 4)]) == tokens


class Toy:
    """A prior that knows that a token is mostly the one before, plus one."""

    def __init__(self, name: str = "11" * 32, sure: int = 10_000) -> None:
        self.fingerprint, self.sure = name, sure

    def table(self, before: int) -> Table:
        frequencies = np.ones(256, dtype=np.int64)
        frequencies[(before + 1) % 256] = self.sure
        return Table(frequencies)

    def encode(self, grid: np.ndarray) -> bytes:
        tokens = [255, *grid.ravel().tolist()]
        return packed([self.table(before).interval(token) for before, token in pairwise(tokens)])

    def decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        reader, tokens = Reader(data), [255]
        for _ in range(int(np.prod(shape))):
            tokens.append(reader.read(self.table(tokens[-1])))
        return np.array(tokens[1:]).reshape(shape)


@pytest.fixture
def stairs() -> TokenFile:
    tokens = torch.arange(240).view(12, 20, 1)
    tokens[5, 5] = 3
    return TokenFile(tokens, 90, 160, "", "f" * 64, 256, 8)


def test_a_prior_codes_what_it_expects_in_next_to_nothing(tmp_path: Path, stairs: TokenFile) -> None:
    write_tokens(tmp_path / "a", stairs, Toy())
    assert (tmp_path / "a").stat().st_size < 72 + 32 + 24
    assert same(read_tokens(tmp_path / "a", Toy()), stairs)


def test_a_file_of_a_prior_wants_that_prior(tmp_path: Path, stairs: TokenFile) -> None:
    write_tokens(tmp_path / "a", stairs, Toy())
    with pytest.raises(UserError, match=r"a: coded with prior 111111111111, but none was given: .*--prior"):
        read_tokens(tmp_path / "a")
    with pytest.raises(UserError, match="the given one is 222222222222"):
        read_tokens(tmp_path / "a", Toy("22" * 32))
    with pytest.raises(UserError, match="computes other probabilities on this machine"):
        read_tokens(tmp_path / "a", Toy(sure=10_001))


@pytest.mark.parametrize("frequencies", [[0, 1], [1.0, 1.0], [MOST_POINTS, 1], [-1, 3]])
def test_frequencies_that_are_none(frequencies: list) -> None:
    with pytest.raises(ValueError, match="integers of 1 or more"):
        Table(np.array(frequencies))


@pytest.mark.parametrize("codebook_size", [0, MOST_POINTS + 1, 2**31, 2**32 - 1])
def test_counts_of_more_tokens_than_can_be_coded(codebook_size: int) -> None:
    data = to_bytes(TokenFile(torch.zeros(20, 30, 2, dtype=torch.int64), 100, 100, "", "f" * 64, 17, 8))
    coding, *geometry = _GEOMETRY.unpack_from(data, len(MAGIC))
    assert coding not in (0, 255)
    geometry[5] = codebook_size
    body = MAGIC + _GEOMETRY.pack(coding, *geometry) + data[len(MAGIC) + _GEOMETRY.size : -4]
    with pytest.raises(ValueError, match=f"counts of {codebook_size} tokens"):
        from_bytes(body + struct.pack("<I", zlib.crc32(body)))


@pytest.mark.parametrize(("size", "weight"), [(1, 1), (2, 3), (7, 1), (64, 2), (100, 0), (1000, 64)])
def test_counts_are_those_of_a_plain_table(size: int, weight: int) -> None:
    """The reference is a table of all frequencies and its cumulative sum."""
    generator = np.random.default_rng(size)
    model, table = Counts(size, weight), np.ones(size, dtype=np.int64)
    for token in np.minimum(generator.geometric(3 / size, 300) - 1, size - 1).tolist() if size > 3 else [0] * 50:
        starts = np.concatenate([[0], table.cumsum()])
        for other in {0, token, size - 1}:
            assert model.interval(other) == (starts[other], table[other], starts[-1])
        for point in {0, int(generator.integers(starts[-1])), int(starts[token]), int(starts[token + 1]) - 1, int(starts[-1]) - 1}:
            wanted = int(np.searchsorted(starts, point, side="right")) - 1

            def drawn(total: int, point: int = point, most: int = int(starts[-1])) -> int:
                assert total == most
                return point

            assert model.token(drawn) == wanted
        model.see(token)
        table[token] += weight


def test_a_token_takes_the_same_time_whatever_came_before() -> None:
    """A sorted list of what was seen took time in proportion to its length: minutes for a picture of a million tokens."""
    tokens = np.random.default_rng(0).permutation(2**19).tolist()

    def seconds(count: int) -> float:
        model = Counts(2**19, 1)
        begin = time.process_time()
        for token in tokens[:count]:
            model.see(token)
        return (time.process_time() - begin) / count

    few = min(seconds(2**12) for _ in range(3))
    assert seconds(2**18) < 10 * few

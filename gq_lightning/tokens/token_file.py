"""Token files: the tokens of one picture and the facts needed to decode them, in few bytes.

    magic, version | coding, geometry | fit | tokenizer's fingerprint [| prior's] | checksum of the tokens | tokens | checksum of all

72 bytes and `fit`, then the tokens: of fixed width, entropy-coded with adaptive counts, or coded with a prior, whichever is smallest.
The first checksum covers the decoded tokens, so that a prior that computes differently on another machine causes an error and not a
wrong image. Earlier versions wrote safetensors files, which stay readable (`earlier`).
"""

import math
import re
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import open_regular, write_whole
from gq_lightning.tokens import earlier
from gq_lightning.tokens.entropy_coding import MOST_POINTS, Counts, adaptive_bits, decode, encode

SUFFIX = ".tokens"
SUFFIXES = (SUFFIX, ".tokens.safetensors")
MAGIC = b"GQTF\x02"
_GEOMETRY = struct.Struct("<BIIHIIIHH")  # coding, h, w, n, height, width, codebook_size, downsampling, bytes of fit
_CHECKSUM = struct.Struct("<I")
_FINGERPRINT = 32  # bytes
_FIXED, _PRIOR = 0, 255  # codings; values between are counts of weight 2^(coding - 1)
_WEIGHTS = range(1, 14)
_MOST_TOKENS = 2**28
_MOST_SLOTS = 2**16 - 1  # tokens per position
_MOST_CODED = 2**22  # tokens coded one by one, each in 7 microseconds: half a minute for 16384 x 16384 pixels


class Prior(Protocol):
    """A coder of whole grids by their probabilities, which encoder and decoder must share and the SHA-256 `fingerprint` identifies."""

    @property
    def fingerprint(self) -> str: ...
    def encode(self, grid: NDArray[np.int64]) -> bytes:
        """The bytes of tokens (h, w, n). Raises UserError for a grid that it cannot code."""
        ...

    def decode(self, data: bytes, shape: tuple[int, int, int]) -> NDArray[np.int64]:
        """The inverse of `encode`; other data give other tokens, or ValueError or UserError."""
        ...


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one picture. Inconsistent fields raise UserError.

    Attributes:
        tokens: (h, w, n) int64 in [0, codebook_size), given in any integer type; n at most 65535.
        height: rows of the decoded picture, at most h * downsampling; the rest is padding.
        width: columns of the decoded picture, likewise.
        fit: description of how the picture was fitted to the grid.
        fingerprint: SHA-256 (hexadecimal) of the tokenizer that made the tokens.
        codebook_size: number of values of a token.
        downsampling: pixels per position along one axis.
    """

    tokens: Tensor
    height: int
    width: int
    fit: str
    fingerprint: str
    codebook_size: int
    downsampling: int

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.tokens.shape), self.tokens.dtype
        if not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise UserError(f"tokens are {dtype}: give a tensor of integers (int64)")
        if len(shape) != 3 or not 1 <= math.prod(shape) <= _MOST_TOKENS or shape[2] > _MOST_SLOTS:
            raise UserError(f"tokens of shape {shape}: give (h, w, n), 1 to {_MOST_TOKENS} of them, n at most {_MOST_SLOTS}")
        # uint64 values from 2^63 on become negative, and are refused below
        object.__setattr__(self, "tokens", self.tokens.long())
        for name, most in (("codebook_size", 2**31), ("downsampling", 2**12)):
            _check_integer(name, getattr(self, name), most)
        for name, positions in (("height", self.tokens.shape[0]), ("width", self.tokens.shape[1])):
            _check_integer(name, getattr(self, name), positions * self.downsampling)
        if not isinstance(self.fingerprint, str) or not re.fullmatch(r"[0-9a-f]{64}", self.fingerprint):
            raise UserError("fingerprint is not a SHA-256 in hexadecimal")
        if not isinstance(self.fit, str) or len(self.fit) > 200 or not self.fit.isprintable():
            raise UserError("fit is not a line of at most 200 characters")
        lowest, highest = (int(token) for token in self.tokens.aminmax())
        if lowest < 0 or highest >= self.codebook_size:
            raise UserError(f"tokens from {lowest} to {highest} are out of range: the codebook has {self.codebook_size}")

    @property
    def bits(self) -> float:
        """Size of the tokens in bits, log2(codebook_size) each."""
        return self.tokens.numel() * math.log2(self.codebook_size)

    @property
    def bits_per_pixel(self) -> float:
        """Bits per pixel of the decoded picture."""
        return self.bits / (self.height * self.width)


def write_tokens(path: str | Path, token_file: TokenFile, prior: Prior | None = None) -> None:
    """Writes a token file; equal tokens give equal bytes. A prior codes the tokens with its probabilities if that is smaller, and the file
    can then only be read with the same prior. Raises UserError if it cannot be written, or not be coded with the prior."""
    try:
        data = to_bytes(token_file, prior)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    write_whole(Path(path), data)


def read_tokens(path: str | Path, prior: Prior | None = None) -> TokenFile:
    """Reads a token file of any version and checks every field.

    Raises:
        UserError: the file is damaged or not a token file, or was coded with a prior that is not given or computes differently here.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
        return from_bytes(data, prior) if data.startswith(MAGIC) else earlier.read(data, TokenFile, _MOST_TOKENS)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give a file with the suffix {SUFFIX}") from error
    except PriorNeeded as error:
        raise UserError(f"{path}: {error}") from error
    except (UserError, OSError, ValueError, struct.error, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, or not a token file ({reason}): encode the picture again") from error


class PriorNeeded(UserError):
    """The file is intact, but its prior is missing or computes differently."""


def to_bytes(token_file: TokenFile, prior: Prior | None = None) -> bytes:
    """The bytes of a file."""
    grid = token_file.tokens.cpu().numpy()
    coding, payload = (_FIXED, _packed(grid.ravel(), token_file.codebook_size))
    if grid.size <= _MOST_CODED and token_file.codebook_size <= MOST_POINTS:
        slots = grid.reshape(-1, grid.shape[2]).T
        bits = {weight: sum(adaptive_bits(slot, token_file.codebook_size, 2 ** (weight - 1)) for slot in slots) for weight in _WEIGHTS}
        weight = min(bits, key=lambda weight: bits[weight])
        if bits[weight] < 8 * len(payload):  # an estimate, exact up to the last word, so compare the coded length
            coded = encode(grid.ravel().tolist(), _counts(token_file.codebook_size, weight, grid.shape[2]))
            coding, payload = (weight, coded) if len(coded) < len(payload) else (coding, payload)
    if prior is not None and grid.size <= _MOST_CODED and len(coded := prior.encode(grid)) + _FINGERPRINT < len(payload):
        coding, payload = _PRIOR, coded
    fit = token_file.fit.encode()
    size = (token_file.height, token_file.width, token_file.codebook_size, token_file.downsampling)
    fingerprints = bytes.fromhex(token_file.fingerprint)
    if prior is not None and coding == _PRIOR:
        fingerprints += bytes.fromhex(prior.fingerprint)
    data = MAGIC + _GEOMETRY.pack(coding, *grid.shape, *size, len(fit)) + fit + fingerprints + _CHECKSUM.pack(_checksum(grid)) + payload
    return data + _CHECKSUM.pack(zlib.crc32(data))


def from_bytes(data: bytes, prior: Prior | None = None) -> TokenFile:
    """The inverse of `to_bytes`. Raises UserError, ValueError or struct.error for other bytes."""
    body, ending = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if _CHECKSUM.pack(zlib.crc32(body)) != ending:
        raise UserError("the checksum does not match")
    coding, height, width, slots, *size, fit_length = _GEOMETRY.unpack_from(body, len(MAGIC))
    fields = np.cumsum([len(MAGIC) + _GEOMETRY.size, fit_length, _FINGERPRINT, _FINGERPRINT * (coding == _PRIOR), _CHECKSUM.size])
    fit, fingerprint, theirs, checksum = (body[begin:end] for begin, end in pairwise(fields))
    payload, count, codebook_size = body[fields[-1] :], height * width * slots, size[2]
    if not 1 <= count <= (_MOST_TOKENS if coding == _FIXED else _MOST_CODED) or (coding not in (_FIXED, _PRIOR, *_WEIGHTS)):
        raise UserError("not a token file of this version")
    if coding == _FIXED:
        tokens = _unpacked(payload, count, codebook_size)
    elif coding == _PRIOR:
        if prior is None or prior.fingerprint != theirs.hex():
            given = "none was given" if prior is None else f"the given one is {prior.fingerprint[:12]}"
            raise PriorNeeded(f"coded with prior {theirs.hex()[:12]}, but {given}: decode with that one (--prior)")
        tokens = prior.decode(payload, (height, width, slots))
    else:
        tokens = np.array(decode(payload, count, _counts(codebook_size, coding, slots)))
    grid = tokens.reshape(height, width, slots)
    if _CHECKSUM.pack(_checksum(grid)) != checksum:
        if coding == _PRIOR:
            raise PriorNeeded(
                "its prior computes other probabilities on this machine: decode it where it was encoded, or encode without a prior"
            )
        raise UserError("the checksum of its tokens does not match")
    return TokenFile(torch.from_numpy(grid), size[0], size[1], fit.decode(), fingerprint.hex(), codebook_size, size[3])


def _counts(codebook_size: int, weight: int, slots: int) -> list[Counts]:
    """A model for each token of a position."""
    return [Counts(codebook_size, 2 ** (weight - 1)) for _ in range(slots)]


def _packed(tokens: NDArray[np.int64], codebook_size: int) -> bytes:
    """All tokens with the bit width of the largest possible one, most significant bit first."""
    width = max(1, (codebook_size - 1).bit_length())
    places = np.arange(width)[::-1]
    return np.packbits((tokens.astype(np.uint32)[:, None] >> places.astype(np.uint32)).astype(np.uint8) & 1).tobytes()


def _unpacked(payload: bytes, count: int, codebook_size: int) -> NDArray[np.int64]:
    width = max(1, (codebook_size - 1).bit_length())
    if len(payload) != -(-count * width // 8):
        raise UserError(f"{len(payload)} bytes do not hold {count} tokens of {width} bits")
    bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    if bits[count * width :].any():
        raise UserError("there are bits after the last token")
    return bits[: count * width].reshape(count, width) @ (1 << np.arange(width, dtype=np.int64)[::-1])


def _check_integer(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{name} is {value!r:.40}, not an integer from 1 to {most}")


def _checksum(grid: NDArray[np.int64]) -> int:
    return zlib.crc32(grid.astype("<u4").tobytes())

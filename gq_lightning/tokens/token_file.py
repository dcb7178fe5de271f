"""Token files: the tokens of one picture and what it takes to decode them.

A token file is a safetensors file with one tensor, `tokens` (h, w, n), in the smallest integer type that holds the codebook, and one
metadata entry of JSON (safetensors does not keep the order of several): the other fields of `TokenFile`, and a checksum of everything.
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import open_input, write_whole

SUFFIX = ".tokens.safetensors"
_METADATA = "gq_lightning.tokens"
_HEADER = ("height", "width", "fit", "fingerprint", "codebook_size", "downsampling")
_DTYPES = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}  # codebook sizes that they hold
_MOST_TOKENS = 2**28


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one picture. It cannot be built with fields that contradict each other: that is a UserError.

    Attributes:
        tokens: (h, w, n) int64 in [0, codebook_size).
        height: rows of the picture to give back, at most h * downsampling: what lies beyond was padding.
        width: columns of the picture to give back.
        fit: how the picture met the grid, for people.
        fingerprint: SHA-256 (hexadecimal) of the tokenizer that made the tokens.
        codebook_size: values a token can have.
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
        if self.tokens.dtype != torch.int64 or self.tokens.ndim != 3 or not 1 <= self.tokens.numel() <= _MOST_TOKENS:
            given = f"{self.tokens.dtype} {tuple(self.tokens.shape)}"
            raise UserError(f"tokens are {given}, not torch.int64 (h, w, n), 1 to {_MOST_TOKENS} of them")
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
        """Bits per pixel of the picture that is given back."""
        return self.bits / (self.height * self.width)


def write_tokens(path: Path, token_file: TokenFile) -> None:
    """Writes a token file. Equal tokens give equal bytes. Raises UserError where it cannot."""
    dtype = next(dtype for dtype, most in _DTYPES.items() if token_file.codebook_size <= most)
    tokens = token_file.tokens.cpu().to(dtype).contiguous()
    header = {"version": 1} | {name: getattr(token_file, name) for name in _HEADER}
    header["checksum"] = _checksum(header, tokens)
    write_whole(path, save({"tokens": tokens}, {_METADATA: json.dumps(header, sort_keys=True)}))


def read_tokens(path: Path) -> TokenFile:
    """Reads a token file and checks every field. Raises UserError for a damaged or foreign file."""
    try:
        open_input(path).close()
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            if text is None or list(file.keys()) != ["tokens"]:
                raise UserError("not a token file")
            if math.prod(file.get_slice("tokens").get_shape()) > _MOST_TOKENS:
                raise UserError(f"more than {_MOST_TOKENS} tokens")
            tokens = file.get_tensor("tokens")
        header = json.loads(text)
        if not isinstance(header, dict) or set(header) != {*_HEADER, "version", "checksum"} or tokens.dtype not in _DTYPES:
            raise UserError("not a token file of this version")
        if header.pop("checksum") != _checksum(header, tokens):
            raise UserError("the checksum does not match")
        if header.pop("version") != 1:
            raise UserError("not a token file of this version")
        return TokenFile(tokens.to(torch.int64), **header)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: name a file that ends with {SUFFIX}") from error
    except (UserError, SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: damaged, or not a token file ({reason}): encode the picture again") from error


def _check_integer(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{name} is {value!r:.40}, not an integer from 1 to {most}")


def _checksum(header: dict[str, object], tokens: Tensor) -> int:
    return zlib.crc32(tokens.numpy().tobytes(), zlib.crc32(json.dumps(header, sort_keys=True).encode()))

"""Reads token files of the first version, which were safetensors files. They are no longer written.

They hold one tensor, `tokens` (h, w, n), in the smallest integer type for the codebook, and one metadata entry of JSON with the other
fields of `TokenFile` and a checksum of everything.
"""

import json
import zlib
from collections.abc import Callable
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import parse_json

T = TypeVar("T")
METADATA = "gq_lightning.tokens"
FIELDS = ("height", "width", "fit", "fingerprint", "codebook_size", "downsampling")


def read(data: bytes, make: Callable[..., T], most_tokens: int) -> T:
    """make(tokens, **fields) of a file's bytes. Raises UserError or ValueError for a damaged or foreign one."""
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:
        raise UserError(str(error)) from error
    if list(tensors) != ["tokens"]:
        raise UserError("not a token file")
    tokens = tensors["tokens"]
    if tokens.numel() > most_tokens:
        raise UserError(f"more than {most_tokens} tokens")
    # eight bytes of length, then the JSON that `load` has already parsed for the tensor
    text = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get(METADATA)
    if text is None:
        raise UserError("not a token file")
    header = parse_json(text)
    types = (torch.uint8, torch.uint16, torch.int32)
    if not isinstance(header, dict) or set(header) != {*FIELDS, "version", "checksum"} or tokens.dtype not in types:
        raise UserError("not a token file of this version")
    if header.pop("checksum") != checksum(header, tokens):
        raise UserError("the checksum does not match")
    if header.pop("version") != 1:
        raise UserError("not a token file of this version")
    return make(tokens.to(torch.int64), **header)


def checksum(header: dict[str, object], tokens: Tensor) -> int:
    """CRC-32 of the fields, in the order of their names, and the tokens."""
    return zlib.crc32(tokens.numpy().tobytes(), zlib.crc32(json.dumps(header, sort_keys=True).encode()))

"""Inception features of pictures that were measured before: the originals of an evaluation set are the same for every tokenizer.

A picture is known by the hash of its pixels as they were measured, so that any set, order and number of processes finds it. A feature's
last bits depend on how it was computed, too: on the weights, the libraries, the device, the threads and the number of pictures in the
batch. All of these are part of the place, and a batch is taken from here only whole, so that rFID is the same to the bit with and without.

    cache_folder()/features/HASH OF HOW/ab/cdef…     2048 float32 numbers and their SHA-256: 8 KiB a picture
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from torch import Tensor

from gq_lightning import weights
from gq_lightning.errors import UserError
from gq_lightning.files import cache_folder, write_whole

CHECKSUM = 32  # bytes of a SHA-256


def remembered(pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Features (B, D), float32, of pictures (B, 3, H, W), uint8: from the cache, else computed and kept there.

    What is damaged is computed and written again. A folder that cannot be written costs the cache and nothing else.
    """
    if not len(pixels):
        return compute(pixels)
    folder = cache_folder() / "features" / _how(pixels)
    names = [_sha256(f"{list(pixels.shape[1:])}\n".encode() + picture.tobytes()).hex() for picture in pixels.cpu().numpy()]
    paths = [folder / name[:2] / name[2:] for name in names]
    known = [features for path in paths if (features := _read(path)) is not None]
    if len(known) == len(paths):
        return torch.stack(known).to(pixels.device)
    features = compute(pixels)
    with suppress(UserError):
        for path, row in zip(paths, features.float().cpu().numpy(), strict=True):
            content = row.astype("<f4").tobytes()
            write_whole(path, _sha256(content) + content)
    return features


def _how(pixels: Tensor) -> str:
    """All that the bits of a feature depend on beside the picture."""
    if pixels.device.type == "cuda":
        device = torch.cuda.get_device_name(pixels.device)
    else:
        device = f"{pixels.device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    libraries = [f"{package} {version(package)}" for package in ("torch", "torch-fidelity")]
    return _sha256("\n".join([weights.checksum("inception"), *libraries, device, f"batch {len(pixels)}"]).encode()).hex()[:16]


def _read(path: Path) -> Tensor | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) <= CHECKSUM or _sha256(content[CHECKSUM:]) != content[:CHECKSUM]:
        return None
    return torch.from_numpy(numpy.frombuffer(content[CHECKSUM:], "<f4").astype("float32"))


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()

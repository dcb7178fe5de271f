"""A cache of Inception features. The originals of an evaluation set are the same for every tokenizer.

An image is identified by the hash of its pixels, so that it is found in any set, order and number of processes. A feature's last bits
also depend on the weights, the libraries, the device, the threads and the number of images in the batch. All of these are part of the
cache's path, and a batch is taken from the cache only if all of it is there, so that the cache does not change rFID by a single bit.

    cache_folder()/features/HASH OF HOW/ab/cdef…     2048 float32 numbers and their SHA-256: 8 KiB per image
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
EXTRACTOR = "batch norms folded, channels last"  # how inception.py runs the network; change it together with that


def remembered(pixels: Tensor, compute: Callable[[Tensor], Tensor], kind: str = "") -> Tensor:
    """Features (B, D), float32, of images (B, 3, H, W), uint8, from the cache, or computed and stored there.

    Damaged entries are computed and written again. If the folder is not writable, there is no cache. Features of another `kind` are
    stored elsewhere.
    """
    if not len(pixels):
        return compute(pixels)
    folder = cache_folder() / "features" / (_how(pixels) + kind)
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
    """Hash of everything besides the image that affects the bits of a feature."""
    if pixels.device.type == "cuda":
        device = torch.cuda.get_device_name(pixels.device)
    else:
        device = f"{pixels.device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    libraries = [f"{package} {version(package)}" for package in ("torch", "torch-fidelity")] + [EXTRACTOR]
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

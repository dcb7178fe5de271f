"""The last layer of the Inception of 2015, which the Inception score needs. Only the official file has it, so it may be missing."""

import os
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import write_whole
from gq_lightning.weights import sources
from gq_lightning.weights.cache import checksum, content_sha256, folder

SHAPE = (1008, 2048)


def classifier() -> Tensor | None:
    """Its weights (1008, 2048), float32 on the CPU, without the bias; None if they are not in the cache and cannot be fetched.

    The official file is verified by the digits in its name and by its other tensors, whose content is pinned.
    """
    path = folder() / "inception-classifier.safetensors"
    if (known := _read(path)) is not None or os.environ.get("GQ_LIGHTNING_OFFLINE") == "1":
        return known
    try:
        state = sources.official("inception")
    except sources.SourceError:
        return None
    weight = state.get("fc.weight")
    if weight is None or tuple(weight.shape) != SHAPE or content_sha256(sources.wanted(state)) != checksum("inception"):
        return None
    tensors = {"weight": weight.detach().float().contiguous()}
    with suppress(UserError):  # a cache that cannot be written costs time only
        write_whole(path, safetensors.torch.save(tensors, {"sha256": content_sha256(tensors)}))
    return tensors["weight"]


def _read(path: Path) -> Tensor | None:
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            recorded = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    intact = content_sha256(tensors) == recorded and {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"weight": SHAPE}
    return tensors["weight"] if intact else None

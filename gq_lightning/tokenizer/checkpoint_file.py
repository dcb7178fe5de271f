"""A checkpoint as a file: what torch.save writes is a zip archive, whose checksums torch does not look at.

file --every member's CRC-32--> torch's restricted unpickler --> tensors and plain data
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from gq_lightning.errors import UserError
from gq_lightning.files import open_regular

PIECE = 2**20


def read_checkpoint(
    path: str | Path,
    mmap: bool = False,
    map_location: Any = "cpu",
    weights_only: bool = True,
    placeholders: Callable[[list[str]], list[Any]] = lambda names: [],
) -> Any:
    """What a checkpoint holds, read without running code from it, once it is known to be undamaged.

    Args:
        path: a file that torch.save wrote.
        mmap: map the tensors instead of reading them: those that nobody looks at cost nothing.
        map_location: of torch.load.
        weights_only: as for torch.load. False runs what is in the file.
        placeholders: given the names of the classes in it that torch does not know, what stands for which, as `safe_globals` takes it.

    Raises:
        UserError: it is damaged, no checkpoint, holds more than tensors and plain data, or tensors of more numbers than are in the file.
        FileNotFoundError: there is none.
    """
    try:
        with open_regular(path) as file:
            size = _check_archive(file)
            names = sorted(get_unsafe_globals_in_checkpoint(str(path))) if weights_only else []
            with safe_globals(placeholders(names)):
                content = torch.load(str(path) if mmap else file, map_location=map_location, weights_only=weights_only, mmap=mmap)
        for tensor in _tensors(content):
            _check_size(tensor, size)
        return content
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # torch raises what pickle, zipfile and its own reader raise
        # of the rest, torch explains at length how to run what is in the file
        said = isinstance(error, OSError | ValueError | zipfile.BadZipFile) and str(error)
        reason = (said or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path}: damaged, no checkpoint, or with more in it than tensors and plain data ({reason}): take another"
        ) from error


def _check_archive(file: BinaryIO) -> int:
    """Reads all of an archive and returns its length, in bytes. Raises BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise zipfile.BadZipFile("a name is there twice")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise zipfile.BadZipFile("a member is compressed, which torch never does")

        def check(member: zipfile.ZipInfo) -> None:
            with archive.open(member) as content:  # it compares the checksum at its end
                while content.read(PIECE):
                    pass

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(check, members):
                pass
    length = file.seek(0, 2)
    file.seek(0)
    return length


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in plain data, which may hold itself."""
    left, seen = [content], set[int]()
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, list | tuple | set):
            left += thing


def _check_size(tensor: Tensor, size: int) -> None:
    """Raises ValueError where a tensor has more numbers than the `size` bytes of its file hold, by strides of 0: a copy has them all."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
        raise ValueError(f"a tensor that is not plain, {tensor.layout} on {tensor.device}")
    needed = math.prod(tensor.shape) * tensor.element_size()
    if not needed <= tensor.untyped_storage().nbytes() <= size:
        raise ValueError(f"a tensor that asks for {needed} bytes of memory, more than the file has for it")

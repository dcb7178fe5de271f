"""Shards: pictures in tar archives, read by position with an index.

DIR/train-000000.tar, DIR/train-000000.json, ... --read_shard--> members --ShardSet--> pictures, in any order

Access is random, not streamed: order, epochs and resuming are the same as for the pictures in a folder, to the bit. Shards avoid opening
millions of files; bytes are read by position from archives that stay open.
"""

import io
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import compress
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from gq_lightning.data.folders import SplitPictures
from gq_lightning.data.pictures.index import keep, recall, sealed, unsealed
from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.pictures.reading import BrokenImage, Suffices, load_picture
from gq_lightning.data.sets import TAIL, CenterCrop, StoredSet, TrainingCrop
from gq_lightning.data.shards.tar import pictures_in, read_members
from gq_lightning.errors import UserError
from gq_lightning.files import open_regular, write_whole

FORMAT, OLD = "gq_lightning shard 2", "gq_lightning shard 1"  # of an index; the older format has no checksums
LARGEST = 1 << 30  # bytes of a picture; a larger one would have too many pixels
UNKNOWN = -1  # checksum of a picture in an archive that `shard` did not write
REBUILD = "`python -m gq_lightning shard` with the arguments for these shards rebuilds it"
logger = logging.getLogger("gq_lightning.data")


class Shard(NamedTuple):
    """An archive and the pictures in it.

    Attributes:
        places: (pictures, 4) int64: start of the headers, start of the bytes, number of bytes, and the CRC-32 of headers and bytes or
            UNKNOWN.
        left_out: pictures of the folder that are not in the archive, by name, with the reason.
        indexed: whether a valid index is next to it.
    """

    path: Path
    names: Sequence[str]
    places: np.ndarray
    left_out: Mapping[str, str]
    indexed: bool = False

    @classmethod
    def of(cls, path: Path, members: Sequence[Sequence[Any]], left_out: Mapping[str, str], indexed: bool = False) -> "Shard":
        """A shard from its members (name, start, offset, size, checksum)."""
        places = np.array([place for _, *place in members], dtype=np.int64).reshape(len(members), 4)
        return cls(path, [name for name, *_ in members], places, left_out, indexed)


class _Unfit(UserError):
    """An index that cannot be trusted, except perhaps for its `left_out`."""

    def __init__(self, message: str, left_out: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.left_out = left_out or {}


def read_shard(path: Path) -> Shard:
    """The content of an archive, from the index that `shard` wrote next to it, or from one pass over its headers, which is then cached.

    If the index is damaged or belongs to another archive, a warning names it and the archive's headers are read. Each picture is checked
    against its index entry when it is read. Raises UserError, see `read_members`.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    left_out: Mapping[str, str] = {}
    try:
        if (shard := _beside(path, status.st_size)) is not None:
            return shard
    except _Unfit as error:
        left_out = error.left_out
        logger.warning("%s; the archive is read without it: %s", error, REBUILD)
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    if (kept := recall(path)) is None or kept["state"] != state:
        keep(path, kept := {"state": state, "members": [(*member, UNKNOWN) for member in read_members(path)]})
    return Shard.of(path, kept["members"], left_out)


def write_index(path: Path, archive: Path, left_out: Mapping[str, str]) -> None:
    """Writes the index of a shard next to its final path `path`. `archive` is the current path of the file."""
    with open_regular(archive) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        members = [
            (*member, zlib.crc32(os.pread(descriptor, member.offset + member.size - member.start, member.start)))
            for member in read_members(archive)
        ]
    content = {"format": FORMAT, "size": size, "members": members, "left_out": left_out}
    write_whole(path.with_suffix(".json"), sealed(content))


def _beside(path: Path, size: int) -> Shard | None:
    """The shard from the index next to it, or None if there is none. Raises _Unfit if the index cannot be trusted."""
    index = path.with_suffix(".json")
    try:
        with open_regular(index) as file:
            text = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Unfit(f"{index} cannot be read: {error.strerror or error}") from error
    try:
        content = unsealed(text)
        if content is None:
            other = json.loads(text)  # a valid file of another kind
            if isinstance(other, dict) and other.get("format") == OLD:
                raise _Unfit(f"{index} has the older format, without checksums", other["left_out"])
            return None
        shard = Shard.of(path, content["members"], {str(name): str(reason) for name, reason in content["left_out"].items()}, True)
        names = "\0/".join(["", *shard.names, ""])
        names.encode("utf-8", "surrogateescape")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _Unfit(f"{index} is damaged") from error
    # a name stays within the folder if no part of it is empty or begins with a dot
    plain = not any(wrong in names for wrong in ("/.", "//", "/\0")) and names.count("\0") - 1 == len(shard.names) == len({*shard.names})
    starts, offsets, sizes, _ = shard.places.T
    inside = (starts >= 0) & (starts + BLOCKSIZE <= offsets) & (sizes >= 0) & (sizes <= size) & (offsets <= size - sizes)
    if (content["format"], content["size"]) != (FORMAT, size) or not plain or not inside.all():
        raise _Unfit(f"{index} is damaged, or belongs to another archive")
    return shard


class ShardSet(StoredSet):
    """The pictures of shards, in order, for which `chosen` (pictures,) bool is true; None takes all. Names are those of the members,
    prefixed with their shards' names if two are equal."""

    readers = 1

    def __init__(self, shards: Sequence[Shard], chosen: np.ndarray | None, crop: CenterCrop | TrainingCrop, split: str) -> None:
        chosen = np.ones(sum(len(shard.names) for shard in shards), dtype=bool) if chosen is None else chosen
        super().__init__(compress(names_of(shards), chosen), crop, split)
        self.paths = [str(shard.path) for shard in shards]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.names) for shard in shards])[chosen]
        self._places = np.concatenate([shard.places for shard in shards])[chosen]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # archives, the most recently used at the end

    def load(self, index: int, suffices: Suffices | None = None) -> Image.Image:
        try:
            return load_picture(io.BytesIO(self.content(index)), self.place(index), suffices)
        except OSError as error:
            raise BrokenImage(f"{self.place(index)}: {error.strerror or error}") from error

    def content(self, index: int) -> bytes:
        start, offset, size, checksum = self._places[index].tolist()
        if size > LARGEST:
            raise OSError(f"{size} bytes are too many for a picture")
        stored = os.pread(self._archive(int(self._shard[index])).fileno(), offset + size - start, start)
        try:
            member = next(pictures_in(io.BytesIO(stored), []), None)
        except UserError:
            member = None
        if member is None or member[1:] != (0, offset - start, size) or not f"/{self.names[index]}".endswith(f"/{member.name}"):
            raise OSError("is not at its position in the index: the shard has changed, or is damaged")
        if checksum not in (UNKNOWN, zlib.crc32(stored)):
            raise OSError("differs from its checksum in the index: the shard is damaged, copy it again")
        return stored[offset - start :]

    def tail(self, index: int) -> bytes:
        _, offset, size, _ = self._places[index].tolist()
        return os.pread(self._archive(int(self._shard[index])).fileno(), min(size, TAIL), offset + max(0, size - TAIL))

    def place(self, index: int) -> str:
        return f"{self.paths[self._shard[index]]}: {self.names[index]}"

    def size(self, index: int) -> int:
        return int(self._places[index, 2])

    def _archive(self, shard: int) -> BinaryIO:
        if shard not in self._open:
            if len(self._open) >= max(1, os.sysconf("SC_OPEN_MAX") // 2):
                self._open.popitem(last=False)[1].close()
            self._open[shard] = open_regular(self.paths[shard])
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # each process opens its own files

    def __del__(self) -> None:
        for archive in self.__dict__.get("_open", {}).values():
            archive.close()


def names_of(shards: Sequence[Shard]) -> list[str]:
    """Names of all pictures, prefixed with their shards' names if two are equal."""
    names = [name for shard in shards for name in shard.names]
    if len(set(names)) == len(names):
        return names
    return [f"{shard.path.name}/{name}" for shard in shards for name in shard.names]


class Shards(SplitPictures):
    """Tar archives of pictures, as ``python -m gq_lightning shard`` or WebDataset's tools write them. Other files in them are skipped.

    Without `validation`, a share of the pictures is held out by name, as in ImageFolder. The shards of a folder are split, ordered and
    cropped exactly like the folder.

    Args:
        root: folder of the archives.
        training: name pattern of the training archives.
        validation: name pattern of the validation archives; null takes a share of the training archives.
    """

    kind, kinds = "shards", "shards"

    def __init__(self, root: str, training: str = "train-*.tar", validation: str | None = None, **settings: Any) -> None:
        super().__init__(root, **settings)
        self.training, self.validation = training, validation

    def prepare_data(self) -> None:
        """Reads the headers of shards without an index, so that the other processes need not."""
        for pattern in {self.training, self.validation or self.training}:
            with suppress(UserError):  # reported when the pictures are used
                self._read(pattern)

    def all_names(self) -> Sequence[str]:
        return names_of(self._shards)

    def some(self, chosen: np.ndarray, crop: CenterCrop | TrainingCrop, split: str) -> StoredSet:
        return ShardSet(self._shards, chosen, crop, split)

    def separate(self, crop: CenterCrop, split: str) -> StoredSet | None:
        return None if self.validation is None else ShardSet(self._read(self.validation), None, crop, split)

    @cached_property
    def _shards(self) -> list[Shard]:
        return self._read(self.training)

    def _read(self, pattern: str) -> list[Shard]:
        try:
            paths = sorted(path for path in self.root.glob(pattern) if not path.name.startswith("."))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"data: {pattern!r} is not a pattern of names below {self.root}: give one such as train-*.tar") from error
        if not paths:
            raise UserError(f"{self.root} has no {pattern}: write shards there with `python -m gq_lightning shard`, or change the pattern")
        with progress(f"indexing {self.root / pattern}, shards", len(paths)) as advance:
            shards = []
            for path in paths:
                shards.append(read_shard(path))
                advance(1)
        if not any(shard.names for shard in shards):
            raise UserError(f"{self.root / pattern}: no pictures in these {len(paths)} archives: give others")
        return shards

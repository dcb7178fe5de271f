"""Shards: pictures in tar archives, each read where an index says that it is.

DIR/train-000000.tar, DIR/train-000000.json, ... --read_shard--> members --ShardSet--> pictures, in any order

Random access, not a stream: order, epochs and resuming are those of the same pictures in a folder, to the bit. What a shard saves is the
search for a million files; its bytes are read by position, from a file that stays open.
"""

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gq_lightning.data.folders import held_out
from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.pictures.index import keep, recall
from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.pictures.reading import BrokenImage, load_picture
from gq_lightning.data.sets import CenterCrop, Cut, PictureSet, StoredSet, TrainingCrop
from gq_lightning.data.shards.tar import BLOCK, header_size, read_members
from gq_lightning.errors import UserError
from gq_lightning.files import write_whole

FORMAT = "gq_lightning shard 1"
LARGEST = 1 << 30  # bytes of a picture; one with more would have too many pixels


class Shard(NamedTuple):
    """An archive and the pictures in it: names, and (pictures,) int64 offsets of their bytes and sizes. `left_out`: why others are not."""

    path: Path
    names: Sequence[str]
    offsets: np.ndarray
    sizes: np.ndarray
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, members: Iterable[Sequence[Any]], left_out: Mapping[str, str]) -> "Shard":
        """A shard by its members: name, offset, size."""
        names, *columns = zip(*members, strict=True) if members else ((), (), ())
        offsets, sizes = (np.array(column, dtype=np.int64).reshape(len(names)) for column in columns)
        return cls(path, names, offsets, sizes, left_out)


def read_shard(path: Path) -> Shard:
    """What is in an archive: by the index that `shard` wrote beside it, or by one pass over its headers, which is kept as an index.

    An index is believed if the archive has the size that it tells. Each picture's header is checked again as the picture is read.

    Raises:
        UserError: see `read_members`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if (shard := _beside(path, status.st_size)) is not None:
        return shard
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    if (kept := recall(path)) is not None and kept["state"] == state:
        return Shard.of(path, kept["members"], {})
    members = read_members(path)
    keep(path, {"state": state, "members": members})
    return Shard.of(path, members, {})


def write_index(path: Path, archive: Path, left_out: Mapping[str, str]) -> None:
    """Writes the index of a shard beside `path`, where it is to be. `archive`: where its bytes are now."""
    content = {"format": FORMAT, "size": archive.stat().st_size, "members": read_members(archive), "left_out": left_out}
    write_whole(path.with_suffix(".json"), json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n")


def _beside(path: Path, size: int) -> Shard | None:
    """The shard by the index beside it; None where that is another archive's, torn, not ours or not there: the archive knows better."""
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        if (content["format"], content["size"]) != (FORMAT, size):
            return None
        shard = Shard.of(path, content["members"], {str(name): str(reason) for name, reason in content["left_out"].items()})
        text = "\0/".join(["", *shard.names, ""])
        text.encode("utf-8", "surrogateescape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    # a name leads nowhere else if no part of it is empty or begins with a dot
    plain = not any(wrong in text for wrong in ("/.", "//", "/\0")) and text.count("\0") - 1 == len(shard.names) == len({*shard.names})
    ends = shard.offsets + shard.sizes
    inside = ((shard.offsets >= BLOCK) & (shard.sizes >= 0) & (ends >= 0) & (ends <= size)).all()
    return shard if plain and inside else None


class ShardSet(StoredSet):
    """The pictures of shards, in their order. Names are those of the members, and begin with their shards' where two were equal.

    Args:
        shards: see `read_shard`.
        chosen: (pictures,) bool, those of all that belong to the set; None takes all.
        crop, split: see StoredSet.
    """

    def __init__(self, shards: Sequence[Shard], chosen: np.ndarray | None, crop: CenterCrop | TrainingCrop, split: str) -> None:
        chosen = np.ones(sum(len(shard.names) for shard in shards), dtype=bool) if chosen is None else chosen
        super().__init__(compress(names_of(shards), chosen), crop, split)
        self.paths = [str(shard.path) for shard in shards]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.names) for shard in shards])[chosen]
        self._offset = np.concatenate([shard.offsets for shard in shards])[chosen]
        self._size = np.concatenate([shard.sizes for shard in shards])[chosen]
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors, the one read last at the end

    def load(self, index: int) -> Image.Image:
        offset, size = int(self._offset[index]), int(self._size[index])
        if size > LARGEST:
            raise BrokenImage(f"{self.place(index)}: {size} bytes are too many for a picture")
        try:
            content = os.pread(self._descriptor(int(self._shard[index])), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise BrokenImage(f"{self.place(index)}: {error.strerror or error}") from error
        if len(content) < BLOCK + size or header_size(content[:BLOCK]) != size:
            raise BrokenImage(f"{self.place(index)}: is not where the index says: the shard has changed, or is damaged")
        return load_picture(io.BytesIO(memoryview(content)[BLOCK:]), self.place(index))

    def place(self, index: int) -> str:
        return f"{self.paths[self._shard[index]]}: {self.names[index]}"

    def size(self, index: int) -> int:
        return int(self._size[index])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= max(1, os.sysconf("SC_OPEN_MAX") // 2):
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens its own

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def names_of(shards: Sequence[Shard]) -> list[str]:
    """The pictures' names; where two shards have one in common, all begin with their shards' names."""
    names = [name for shard in shards for name in shard.names]
    if len(set(names)) == len(names):
        return names
    return [f"{shard.path.name}/{name}" for shard in shards for name in shard.names]


class Shards(ImageDataModule):
    """Tar archives of pictures, as ``python -m gq_lightning shard`` or WebDataset's tools write them.

    What else is in them is passed over. Without `validation`, a share of the pictures is held out by their names, as ImageFolder does:
    the shards of a folder are split, ordered and cropped as the folder is.

    Args:
        root: folder of the archives.
        training: names of the archives to train on, a pattern.
        validation: names of those to evaluate on, all of whose pictures are; null takes a share of the training archives.
        validation_share: that share, between 0 and 1.
        crop: training crops, `resized` (a share of the area, resized), `fast` (the same, resized by torch, some values a little off),
            `native` (a square, never enlarged), `plain` (a square after the shorter side is resized) or `center` (as in
            evaluation: the published training).
        scale: share of the area that a resized or fast crop covers, lower and upper bound.
        image_size: side of the square images in pixels.
        batch_size: images in a training batch, on each device.
        evaluation_batch_size: images in an evaluation batch; null takes batch_size.
        workers: processes that read pictures, at most one a core.
        skip_broken: evaluate without the pictures that cannot be read, instead of stopping at the first.
        max_broken: stop training when more than this share of the pictures drawn so far could not be read.
    """

    def __init__(
        self,
        root: str,
        training: str = "train-*.tar",
        validation: str | None = None,
        validation_share: float = 0.05,
        crop: Cut = "resized",
        scale: tuple[float, float] = (0.8, 1.0),
        image_size: int = 256,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        workers: int = 4,
        skip_broken: bool = False,
        max_broken: float = 0.2,
    ) -> None:
        super().__init__(image_size, batch_size, evaluation_batch_size, workers, skip_broken, max_broken)
        if not 0 < validation_share < 1:
            raise UserError(f"data.validation_share {validation_share}: give a share between 0 and 1")
        self.root, self.training, self.validation = Path(root).expanduser(), training, validation
        self.validation_share = validation_share
        self.training_crop = TrainingCrop(image_size, crop, scale)

    def prepare_data(self) -> None:
        """Reads the headers of shards without an index, so that the other processes need not."""
        for pattern in {self.training, self.validation or self.training}:
            with suppress(UserError):  # said where the pictures are asked for
                self._read(pattern)

    def training_set(self) -> PictureSet:
        if self.validation is not None:
            return ShardSet(self._shards, None, self.training_crop, "training shards")
        if self._held_out.all():
            raise UserError(f"{self.root} has no pictures left to train on: add shards or give data.validation")
        return ShardSet(self._shards, ~self._held_out, self.training_crop, "training share of shards")

    def evaluation_set(self) -> PictureSet:
        crop = CenterCrop(self.image_size)
        if self.validation is not None:
            return ShardSet(self._read(self.validation), None, crop, "validation shards")
        return ShardSet(self._shards, self._held_out, crop, f"{self.validation_share:g} of shards by hashed name")

    @cached_property
    def _shards(self) -> list[Shard]:
        return self._read(self.training)

    @cached_property
    def _held_out(self) -> np.ndarray:
        return held_out(names_of(self._shards), self.validation_share)

    def _read(self, pattern: str) -> list[Shard]:
        try:
            paths = sorted(path for path in self.root.glob(pattern) if not path.name.startswith("."))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"data: {pattern!r} is no pattern of names below {self.root}, such as train-*.tar") from error
        if not paths:
            raise UserError(f"{self.root} has no {pattern}: write shards there with `python -m gq_lightning shard`, or name others")
        with progress(f"indexing {self.root / pattern}, shards", len(paths)) as advance:
            shards = []
            for path in paths:
                shards.append(read_shard(path))
                advance(1)
        if not any(shard.names for shard in shards):
            raise UserError(f"{self.root / pattern}: no pictures in these {len(paths)} archives")
        return shards

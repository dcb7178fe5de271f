"""Writes a folder of pictures to shards, which disks and networks read faster than a million files.

FOLDER --list_pictures--> names in order --> OUT/train-000000.tar, OUT/train-000000.json, OUT/train-000001.tar, ...

Shards are plain tar archives in which WebDataset's tools find one sample per picture. Files have their names relative to FOLDER, escaped
by `tar.member_name`, and unchanged bytes; times and owners are omitted, so that a folder gives the same shards everywhere. A shard is
written completely or not at all, after its index, and an interrupted call resumes after the last shard. Indexes that are missing, damaged
or in the older format are written again.
"""

import io
import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from gq_lightning.data.module import cores
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.pictures.reading import BrokenImage, WhenBroken, load_picture
from gq_lightning.data.shards.module import LARGEST, Shard, read_shard, write_index
from gq_lightning.data.shards.tar import member_name
from gq_lightning.errors import UserError, printable
from gq_lightning.files import Draft, open_regular

logger = logging.getLogger("gq_lightning.data")


class Written(NamedTuple):
    """The result of `write_shards`: number of shards, number of pictures in them, and the pictures left out by name, with reasons."""

    shards: int
    pictures: int
    left_out: dict[str, str]


class _Files(Dataset[tuple[bytes | None, str | None]]):
    """The bytes of files, or None if unreadable; and what is wrong with them, or None."""

    def __init__(self, folder: Path, names: Sequence[str], check: bool) -> None:
        self.folder, self.names, self.check = folder, names, check

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[bytes | None, str | None]:
        try:
            with open_regular(self.folder / self.names[index]) as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            return None, error.strerror or str(error)
        if len(content) > LARGEST:
            return None, "too many bytes for a picture"
        try:
            if self.check:
                load_picture(io.BytesIO(content), ".")
        except BrokenImage as error:
            return content, str(error).removeprefix(".: ")
        return content, None


def write_shards(
    folder: Path, out: Path, split: str = "train", megabytes: float = 256, broken: WhenBroken = "leave-out", workers: int = 2
) -> Written:
    """Writes the pictures of `folder` to shards `split`-NUMBER of at most `megabytes` (10^6 bytes) in `out`, and keeps finished shards.

    It may `leave-out` or `keep` broken pictures that cannot be decoded; a warning names each. `unchecked` decodes none and is as fast as
    the disks. Unreadable files are always left out. Raises UserError if `folder` has no readable pictures, `out` has shards of other
    pictures, or `out` cannot be written.
    """
    if split != Path(split).name or not split or split.startswith("."):
        raise UserError(f"--split {split}: give a prefix for the shards' names, such as train")
    if not (megabytes > 0 and workers >= 0):
        raise UserError(f"--size {megabytes:g} --workers {workers}: give a positive size, and 0 workers or more")
    names = list_pictures(folder)
    finished = _finished(folder, out, split, names)
    left_out = {name: reason for shard in finished for name, reason in shard.left_out.items()}
    pictures = sum(len(shard.names) for shard in finished)
    done = pictures + len(left_out)
    stems = Counter(posixpath.splitext(name)[0] for name in names)
    files = _Files(folder, names[done:], broken != "unchecked")
    loader = DataLoader(files, batch_size=None, num_workers=min(workers, cores()), generator=torch.Generator())
    contents = zip(files.names, loader, strict=True)  # starts the workers before the bar, whose thread they must not inherit
    number, growing = len(finished), None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with progress(f"writing {out}, pictures", len(names)) as advance:
            advance(done)
            for name, (content, reason) in contents:
                keep = content is not None and (reason is None or broken == "keep")
                if reason is not None:
                    logger.warning("%s a broken picture: %s: %s", "kept" if keep else "left out", printable(folder / name), reason)
                room = megabytes * 1e6 - tarfile.BLOCKSIZE - len(content or b"")
                if keep and growing is not None and growing.pictures and growing.file.tell() > room:
                    growing.finish()
                    number, growing = number + 1, None
                growing = growing or _Growing(out / f"{split}-{number:06d}.tar")
                if keep:
                    growing.add(member_name(name, stems[posixpath.splitext(name)[0]] == 1), content)
                    pictures += 1
                else:
                    growing.left_out[name] = left_out[name] = reason
                advance(1)
        if growing is not None and growing.pictures:
            growing.finish()
            number += 1
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}: make room, or choose another --out") from error
    finally:
        if growing is not None:
            growing.discard()
    if not pictures:
        raise UserError(f"none of the {len(names)} pictures of {folder} could be read: nothing was written")
    return Written(number, pictures, left_out)


def _finished(folder: Path, out: Path, split: str, names: list[str]) -> list[Shard]:
    """The finished shards, which must contain the first pictures to be written."""
    shards, done = list[Shard](), 0
    for path in sorted(path for path in out.glob("*.tar") if re.fullmatch(re.escape(split) + r"-\d{6,}\.tar", path.name)):
        shard = read_shard(path)
        held = sorted([*shard.names, *shard.left_out])
        if path.name != f"{split}-{len(shards):06d}.tar" or held != names[done : done + len(held)]:
            raise UserError(f"{path} has other pictures than expected from {folder}: choose another --out, or delete its shards")
        if not shard.indexed:
            write_index(path, path, shard.left_out)
        shards.append(shard)
        done += len(held)
    return shards


class _Growing(Draft):
    """A shard under a temporary name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.left_out: dict[str, str] = {}
        self.pictures = 0
        self._tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")

    def add(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))
        self.pictures += 1

    def finish(self) -> None:
        """Writes the index first, so that an existing shard is complete and has an index."""
        self._tar.close()
        self.complete()
        write_index(self.path, Path(self.file.name), self.left_out)
        self.place()

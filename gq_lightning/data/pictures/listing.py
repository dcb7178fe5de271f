"""Which pictures a folder holds.

A large folder is listed once. The content of each of its directories is kept as an index, and a directory is listed again when its
modification time or inode has changed: one of them does when a file is added, removed or renamed.
"""

import logging
import os
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from gq_lightning.data.pictures.index import keep, recall
from gq_lightning.data.pictures.progress import progress
from gq_lightning.errors import UserError, printable

logger = logging.getLogger("gq_lightning.data")
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs"),
)
# pictures, too, but not read: whoever has some is told
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".ps", ".pdf", ".tga", ".dds", ".exr", ".hdr", ".qoi", ".ico", ".pcx", ".mpo"),
    *(".dng", ".cr2", ".nef", ".arw", ".raw"),
)
LARGE = 10_000  # pictures from which an index is kept; fewer are listed quickly
SETTLED = 2_000_000_000  # nanoseconds; two changes within one tick of a file system's clock show the same time


class Directory(NamedTuple):
    """The content of one directory, sorted, and what tells whether it is still the same; a `modified` of -1 never matches.

    Folders and pictures are names, `others` the suffixes of pictures that are not read."""

    modified: int
    inode: int
    folders: list[str]
    pictures: list[str]
    others: list[str]


def is_picture(name: str) -> bool:
    """Whether a file name is a picture's. Names that begin with a dot are not: file managers leave broken pictures under them."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def other_suffix(name: str) -> str | None:
    """How the name of a picture ends that is passed over, in lower case; None for what is no picture, or one that is read."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix in OTHER_SUFFIXES and not name.startswith(".") else None


def warn_of_others(place: Path, suffixes: Iterable[str]) -> None:
    """Says how many pictures were passed over there, by their suffixes, if any were."""
    if counts := Counter(suffixes):
        said = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        logger.warning("%s: passed over %s: such pictures are not read, convert them to PNG or JPEG", printable(place), said)


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, whatever their suffix, and all pictures in the folders named, recursively; sorted, each once.

    Names that begin with a dot are passed over; links to folders are followed.

    Raises:
        UserError: a path does not exist, or a folder has no pictures or cannot be listed.
    """
    found: set[Path] = set()
    for path in (Path(path).expanduser() for path in paths):
        # os.path takes a name that is too long for one that does not exist
        if os.path.isdir(path):
            found.update(path / name for name in list_pictures(path))
        elif os.path.exists(path):
            found.add(path)
        else:
            raise UserError(f"{path} does not exist: name a picture or a folder of pictures")
    return sorted(found)


def list_pictures(root: Path, hint: str = "") -> list[str]:
    """Names of the pictures in a folder and below, relative to it, sorted. `find_pictures` says which; an index makes the next call quick.

    Raises:
        UserError: it is no folder (the message ends in `hint`), has no pictures, or cannot be listed.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder{': ' + hint if hint else ''}")
    known = {name: Directory(*directory) for name, directory in (recall(root) or {}).items()}
    with progress(f"listing {root}, pictures") as advance:
        found = dict(_walk(root, known, advance))
    warn_of_others(root, (suffix for directory in found.values() for suffix in directory.others))
    names = [posixpath.join(folder, name) for folder, directory in found.items() for name in directory.pictures]
    if not names:
        raise UserError(f"{root} has no pictures: put files there that end in {', '.join(PICTURE_SUFFIXES)}")
    if len(names) >= LARGE and found != known:
        keep(root, found)
    return sorted(names)


def _walk(root: Path, known: Mapping[str, Directory], advance: Callable[[int], None]) -> Iterator[tuple[str, Directory]]:
    """The directories by their names relative to `root`, "" being itself: from above, neighbours in order, each once."""
    visited, waiting = set(), [""]
    while waiting:
        name = waiting.pop()
        real = os.path.realpath(root / name)
        if real in visited:  # a link back to a folder above it
            continue
        visited.add(real)
        try:
            status = os.stat(real)  # before it is listed: a later change shows
            directory = known.get(name)
            if directory is None or (directory.modified, directory.inode) != (status.st_mtime_ns, status.st_ino):
                directory = _list(str(root / name), status, advance)
        except OSError as error:
            raise UserError(f"{root / name} cannot be listed: {error.strerror}") from error
        yield name, directory
        waiting += [posixpath.join(name, folder) for folder in reversed(directory.folders)]


def _list(path: str, status: os.stat_result, advance: Callable[[int], None]) -> Directory:
    folders, pictures, others, settled = [], [], [], status.st_mtime_ns < time.time_ns() - SETTLED
    with os.scandir(path) as entries:
        for entry in entries:
            if _holds(entry.is_dir):
                if not entry.name.startswith("."):
                    folders.append(entry.name)
                continue
            # a link that leads nowhere may lead to a folder tomorrow, and this directory would look the same
            settled = settled and (not entry.is_symlink() or _holds(entry.is_file))
            if is_picture(entry.name):
                pictures.append(entry.name)
                if not len(pictures) % 1000:
                    advance(1000)
            elif suffix := other_suffix(entry.name):
                others.append(suffix)
    advance(len(pictures) % 1000)
    return Directory(status.st_mtime_ns if settled else -1, status.st_ino, sorted(folders), sorted(pictures), sorted(others))


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # links in a circle
        return False

"""Lists the pictures in a folder.

A large folder is listed only once. The content of each of its directories is cached in an index, and a directory is listed again when
its modification time or inode has changed, which happens when a file is added, removed or renamed.
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
# picture formats that are not supported; a warning counts them
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".ps", ".pdf", ".tga", ".dds", ".exr", ".hdr", ".qoi", ".ico", ".pcx", ".mpo"),
    *(".dng", ".cr2", ".nef", ".arw", ".raw"),
)
LARGE = 10_000  # pictures from which an index is kept
SETTLED = 2_000_000_000  # nanoseconds; two changes within one tick of a file system's clock have the same time


class Directory(NamedTuple):
    """The sorted content of one directory, with its modification time and inode; a `modified` of -1 never matches.

    `folders` and `pictures` are names, `others` the suffixes of unsupported pictures."""

    modified: int
    inode: int
    folders: list[str]
    pictures: list[str]
    others: list[str]


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture. Names with a leading dot are not: file managers use them for broken pictures."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def other_suffix(name: str) -> str | None:
    """The suffix, in lower case, of an unsupported picture; None for any other file."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix in OTHER_SUFFIXES and not name.startswith(".") else None


def warn_of_others(place: Path, suffixes: Iterable[str]) -> None:
    """Logs a warning with the number of unsupported pictures by suffix, if there are any."""
    if counts := Counter(suffixes):
        said = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        logger.warning("%s: skipped %s: these formats are not supported, convert them to PNG or JPEG", printable(place), said)


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """The given files, whatever their suffix, and all pictures in the given folders, recursively; sorted, without duplicates.

    Names with a leading dot are skipped; links to folders are followed. Raises UserError if a path does not exist, or a folder has no
    pictures or cannot be listed.
    """
    found: set[Path] = set()
    for path in (Path(path).expanduser() for path in paths):
        # for os.path, a name that is too long does not exist; Path would raise
        if os.path.isdir(path):
            found.update(path / name for name in list_pictures(path))
        elif os.path.exists(path):
            found.add(path)
        else:
            raise UserError(f"{path} does not exist: give a picture or a folder of pictures")
    return sorted(found)


def list_pictures(root: Path, hint: str = "") -> list[str]:
    """Names of the pictures that `find_pictures` finds in a folder, relative to it, sorted. An index makes the next call fast. Raises
    UserError if it is not a folder (the message ends with `hint`), has no pictures, or cannot be listed."""
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
    """The directories by their names relative to `root` ("" for itself), depth first, in order, each once."""
    visited, waiting = set(), [""]
    while waiting:
        name = waiting.pop()
        real = os.path.realpath(root / name)
        if real in visited:  # a link to a folder above it
            continue
        visited.add(real)
        try:
            status = os.stat(real)  # before listing, so that a later change is detected
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
            # a broken link may later point to a folder without changing this directory's modification time
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
    except OSError:  # circular links
        return False

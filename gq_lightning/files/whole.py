"""Atomic writes: a file is written completely or not at all.

.NAME.0123456789ab.tmp, locked by its writer --fsync--> NAME --fsync of the folder

The kernel releases a lock when its process ends for any reason. So an unlocked temporary file was left by a killed writer, and the next
process that writes NAME removes it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO
from uuid import uuid4

from platformdirs import user_cache_path

from gq_lightning.errors import UserError

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp", re.DOTALL)
# bytes of the name within a temporary name, so that the latter is not too long for the file system
LONGEST = 200


def cache_folder() -> Path:
    """``GQ_LIGHTNING_HOME`` if set, else the user's cache folder."""
    home = os.environ.get("GQ_LIGHTNING_HOME")
    return Path(home).expanduser() if home else user_cache_path("gq_lightning")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, creating its folder. Raises UserError if that fails; an existing file then stays unchanged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: make room, or choose another folder") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that becomes `path` when the block ends without an error. The folder must exist. Raises OSError."""
    with Draft(path) as draft:
        yield draft.file
        draft.place()


class Draft:
    """A temporary `file` next to `path` that becomes `path` by `place`. As a context manager it discards a file that was not placed."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, _begin(path)

    def complete(self) -> None:
        """Flushes the file to disk. Raises OSError."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def place(self, name: str | None = None) -> None:
        """Completes the file and gives it its final name, or `name` in the same folder. Raises OSError."""
        self.complete()
        os.replace(self.file.name, self.path.with_name(name) if name else self.path)
        self.file.close()
        with suppress(OSError):  # so that the name survives a power failure; not every file system supports this
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Removes the file unless it has been placed."""
        if not self.file.closed:
            with suppress(OSError):
                os.unlink(self.file.name)
            with suppress(OSError):  # flushing the buffer may fail on a full disk
                self.file.close()

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Lets one process at a time run the block for a folder, if the file system has locks. Raises OSError."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock(file: IO) -> bool:
    """Locks a file for this process until it is closed or the process ends. False if another process holds the lock, or has removed or
    renamed the file. Raises OSError if the system or the file system has no locks."""
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _begin(path: Path) -> BinaryIO:
    """Opens a new temporary file, locked for this writer."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST])
    for left in _leftovers(path.parent.absolute()).pop(name, ()):
        _remove_unless_alive(left)
    while True:
        file = open(path.with_name(f".{name}.{uuid4().hex[:12]}.tmp"), "xb")  # noqa: SIM115
        try:
            if lock(file):
                return file
        except OSError:
            return file  # unlocked: a kill would leave it behind for good
        # another process removed the file between creation and locking
        file.close()


@cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Temporary files by final name, listed once per process and folder: a listing at each write would make the time to fill a folder
    quadratic in the number of files."""
    found: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := TEMPORARY.fullmatch(entry.name):
                found.setdefault(match[1], []).append(Path(entry.path))
    return found


def _remove_unless_alive(path: Path) -> None:
    with suppress(OSError), open(path, "r+b") as file:
        if lock(file):
            path.unlink()

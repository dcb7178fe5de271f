"""How a file is written: whole, or not at all.

.NAME.0123456789ab.tmp, locked by its writer --fsync--> NAME --fsync of the folder

The kernel releases a lock when its process ends, however that happens. So a temporary file without one is what a killed writer has
left, and the next process that writes NAME removes it.
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
# bytes of a name, so that the temporary one is not too long for the file system
LONGEST = 200


def cache_folder() -> Path:
    """``GQ_LIGHTNING_HOME``, else the user's cache folder."""
    home = os.environ.get("GQ_LIGHTNING_HOME")
    return Path(home).expanduser() if home else user_cache_path("gq_lightning")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, with its folder. Raises UserError where that fails; the file that was there stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: make room, or choose another place") from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends well. Its folder exists. Raises OSError."""
    with Draft(path) as draft:
        yield draft.file
        draft.place()


class Draft:
    """A file under a temporary name beside `path`, which is to become `path`. As a context it discards what has not been placed.

    Attributes:
        path: what it is to become.
        file: what to write to.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, _begin(path)

    def complete(self) -> None:
        """Waits until all of it is on the disk. Raises OSError."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def place(self, name: str | None = None) -> None:
        """Gives it its name, or another one beside, completed. Raises OSError."""
        self.complete()
        os.replace(self.file.name, self.path.with_name(name) if name else self.path)
        self.file.close()
        with suppress(OSError):  # the new name, too, is to survive a power failure; not every file system can do that
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def discard(self) -> None:
        """Removes it, unless it has been placed."""
        if not self.file.closed:
            with suppress(OSError):
                os.unlink(self.file.name)
            with suppress(OSError):  # a full disk may refuse what is still in the buffer
                self.file.close()

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Waits until no other one is within this block for the same folder, where the file system has locks. Raises OSError."""
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
    """Locks a file for this process until it is closed or the process ends.

    Returns:
        Whether that went well: False if another process holds the lock, or has removed or renamed the file.

    Raises:
        OSError: there are no locks on this system, or on that file system.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _begin(path: Path) -> BinaryIO:
    """A new temporary file, which no other writer shares."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST])
    for left in _leftovers(path.parent.absolute()).pop(name, ()):
        _remove_unless_alive(left)
    while True:
        file = open(path.with_name(f".{name}.{uuid4().hex[:12]}.tmp"), "xb")  # noqa: SIM115
        try:
            if lock(file):
                return file
        except OSError:
            return file  # unlocked: what a kill leaves of it stays
        # removed by one who came between our making and our locking it
        file.close()


@cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Temporary files, by the name of what they were to become, as this process finds them first: to list the folder at each write would
    make the time to fill it quadratic in its files."""
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

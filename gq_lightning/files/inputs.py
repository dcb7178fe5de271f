"""How a file that somebody else has made is opened."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_input(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is a named pipe, a device or a socket: those are neither opened nor waited for.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open says what it is
        raise OSError(errno.EINVAL, "a named pipe, a device or a socket is not read", path)
    # what has become a pipe since then is empty
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

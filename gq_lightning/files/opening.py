"""How a file of others is opened and its JSON read: nothing in it makes us wait, run out of memory, or take one thing for another."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, open to be read.

    A named pipe would be waited for, a device may never end, and to open some of them has effects.

    Raises:
        OSError: it cannot be opened, or is a named pipe, a device or a socket.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open says what it is
        raise OSError(errno.EINVAL, "a named pipe, a device or a socket is not read", path)
    # not waiting: what has become a pipe since then is empty
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(text: str | bytes) -> Any:
    """JSON as its standard has it: no name twice in an object, no NaN, no infinity, no nesting that exhausts the stack.

    Raises:
        ValueError: it is not.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

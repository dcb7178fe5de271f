"""Opens untrusted files and parses their JSON. They can neither block the process nor exhaust its memory nor be misread."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Reading a named pipe would block, a device may never end, and opening some devices has side effects. Raises OSError if the file cannot
    be opened, or is a named pipe, a device or a socket.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open has a clear error for a folder
        raise OSError(errno.EINVAL, "a named pipe, a device or a socket is not read", path)
    # O_NONBLOCK, in case the file has just been replaced by a pipe
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(text: str | bytes) -> Any:
    """Parses standard JSON: no duplicate names in an object, no NaN, no infinity, no nesting that exhausts the stack. Raises ValueError if
    the text is not standard JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} occurs twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

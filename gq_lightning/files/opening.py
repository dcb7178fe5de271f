"""How a file of others is opened and its JSON read: nothing in it makes us wait, run out of memory, or take one thing for another."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from gq_lightning.errors import UserError


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, or a link to one, open to be read.

    A named pipe would be waited for, a device may never end, and to open some of them has effects.

    Raises:
        UserError: it is a folder, pipe, socket or device. OSError: it is not there, or may not be read.
    """
    _check_regular(path, os.stat(path).st_mode)
    # not waiting, in case it has become a pipe since
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{path}: a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file: copy its content to a file")


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

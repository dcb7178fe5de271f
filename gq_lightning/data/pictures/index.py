"""Listings that took long are kept in the user's cache folder: JSON with its SHA-256, in a file named by a hash of the path listed."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from gq_lightning.errors import UserError, printable
from gq_lightning.files import cache_folder, write_whole

VERSION = 1  # of the content; files of other versions are not read
logger = logging.getLogger("gq_lightning.data")


def recall(path: Path) -> Any:
    """What `keep` last stored for that file or folder, links resolved; None where there is nothing, or it is damaged."""
    try:
        digest, _, content = _file(path).read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    kept = json.loads(content)
    return kept["content"] if (kept["version"], kept["path"]) == (VERSION, os.path.realpath(path)) else None


def keep(path: Path, content: Any) -> None:
    """Stores plain data for `recall`. Where it cannot be written, a warning says so; nothing is raised."""
    # file names that are not valid text contain lone surrogates, which ASCII escapes
    kept = json.dumps({"version": VERSION, "path": os.path.realpath(path), "content": content}, separators=(",", ":")).encode("ascii")
    try:
        write_whole(_file(path), hashlib.sha256(kept).hexdigest().encode() + b"\n" + kept)
    except UserError as error:
        logger.warning("%s is listed again at each start: %s (or set GQ_LIGHTNING_HOME)", printable(path), str(error).rpartition(": ")[0])


def _file(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "listings" / f"{digest[:32]}.json"

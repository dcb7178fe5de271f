"""Listings that took long, kept in the user's cache folder: JSON under its SHA-256, in a file that is named after the path listed."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from gq_lightning.errors import UserError, printable
from gq_lightning.files import cache_folder, write_whole

VERSION = 1  # of the content; what other versions have kept is not read
logger = logging.getLogger("gq_lightning.data")


def recall(path: Path) -> Any:
    """What `keep` was given last for that file or folder, by whatever name it goes; None where there is nothing, or it is damaged."""
    try:
        digest, _, content = _file(path).read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    kept = json.loads(content)
    return kept["content"] if (kept["version"], kept["path"]) == (VERSION, os.path.realpath(path)) else None


def keep(path: Path, content: Any) -> None:
    """Keeps plain data for `recall`. Where that cannot be written, a warning says so, and nothing else happens."""
    # names that are no text come as lone surrogates, which ASCII escapes
    kept = json.dumps({"version": VERSION, "path": os.path.realpath(path), "content": content}, separators=(",", ":")).encode("ascii")
    try:
        write_whole(_file(path), hashlib.sha256(kept).hexdigest().encode() + b"\n" + kept)
    except UserError as error:
        logger.warning("%s is listed again at each start: %s (or set GQ_LIGHTNING_HOME)", printable(path), str(error).rpartition(": ")[0])


def _file(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "listings" / f"{digest[:32]}.json"

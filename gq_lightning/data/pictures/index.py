"""JSON that is noticed to be damaged, and the listings that took long, kept as such in the user's cache folder by a hash of their path."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from gq_lightning.errors import UserError, printable
from gq_lightning.files import cache_folder, write_whole

VERSION = 2  # of the content; files of other versions are not read
logger = logging.getLogger("gq_lightning.data")


def sealed(content: Any) -> bytes:
    """Plain data as a line of its SHA-256 and one of JSON."""
    # file names that are not valid text contain lone surrogates, which ASCII escapes
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text + b"\n"


def unsealed(sealed: bytes) -> Any:
    """The data; None where these bytes are not what `sealed` made, or not all of it."""
    digest, _, text = sealed.partition(b"\n")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != digest:
        return None
    return json.loads(text)


def recall(path: Path) -> Any:
    """What `keep` last stored for that file or folder, links resolved; None where there is nothing, or it is damaged."""
    try:
        kept = unsealed(_file(path).read_bytes())
    except OSError:
        return None
    return kept["content"] if kept and (kept["version"], kept["path"]) == (VERSION, os.path.realpath(path)) else None


def keep(path: Path, content: Any) -> None:
    """Stores plain data for `recall`. Where it cannot be written, a warning says so; nothing is raised."""
    try:
        write_whole(_file(path), sealed({"version": VERSION, "path": os.path.realpath(path), "content": content}))
    except UserError as error:
        logger.warning("%s is listed again at each start: %s (or set GQ_LIGHTNING_HOME)", printable(path), str(error).rpartition(": ")[0])


def _file(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "listings" / f"{digest[:32]}.json"

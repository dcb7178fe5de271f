"""JSON with a checksum, and a cache of folder listings in this form, in the user's cache folder under a hash of their path."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from gq_lightning.errors import UserError, printable
from gq_lightning.files import cache_folder, write_whole

VERSION = 2  # of the content; other versions are ignored
logger = logging.getLogger("gq_lightning.data")


def sealed(content: Any) -> bytes:
    """Plain data as two lines, a SHA-256 and JSON."""
    # invalid file names contain lone surrogates, which ASCII JSON escapes
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text + b"\n"


def unsealed(sealed: bytes) -> Any:
    """The data, or None if the bytes are not the complete output of `sealed`."""
    digest, _, text = sealed.partition(b"\n")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != digest:
        return None
    return json.loads(text)


def recall(path: Path) -> Any:
    """The content that `keep` last stored for a file or folder, with links resolved; None if there is none or it is damaged."""
    try:
        kept = unsealed(_file(path).read_bytes())
    except OSError:
        return None
    return kept["content"] if kept and (kept["version"], kept["path"]) == (VERSION, os.path.realpath(path)) else None


def keep(path: Path, content: Any) -> None:
    """Stores plain data for `recall`. Logs a warning if it cannot be written."""
    try:
        write_whole(_file(path), sealed({"version": VERSION, "path": os.path.realpath(path), "content": content}))
    except UserError as error:
        logger.warning(
            "%s will be listed again at each start: %s (or set GQ_LIGHTNING_HOME)", printable(path), str(error).rpartition(": ")[0]
        )


def _file(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "listings" / f"{digest[:32]}.json"

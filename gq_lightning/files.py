"""Where the package keeps files of its own, and how a file is written: whole, or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from platformdirs import user_cache_path

from gq_lightning.errors import UserError


def cache_folder() -> Path:
    """``GQ_LIGHTNING_HOME``, else the user's cache folder."""
    home = os.environ.get("GQ_LIGHTNING_HOME")
    return Path(home).expanduser() if home else user_cache_path("gq_lightning")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, with its folder, under a temporary name first: a reader sees all of it or nothing. Raises UserError."""
    temporary = path.with_name(f".{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}: make room, or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()

"""Where the pictures lie in a tar archive, by its headers alone. Nothing is extracted, and sizes beyond the end of the file are refused.

The format: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html (ustar, pax), and GNU's long names.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gq_lightning.data.pictures.listing import is_picture
from gq_lightning.errors import UserError

BLOCK = tarfile.BLOCKSIZE
LONGEST_NOTE = 1 << 20  # bytes that are read of a long name or of pax records, which come before the header that they belong to
NOTES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class Member(NamedTuple):
    """A picture in an archive: its name, without ``./``, and where its bytes are. The BLOCK before them is its header."""

    name: str
    offset: int
    size: int


def read_members(archive: Path) -> list[Member]:
    """The pictures of an archive in their order, those that `find_pictures` would find if it were unpacked.

    Raises:
        UserError: it cannot be read, is compressed, damaged or cut short, or a picture in it is a link, a device, there twice, or
            has a name that leads out of the archive. The message names archive and member.
    """
    try:
        with archive.open("rb", buffering=0) as file:
            members = list(_pictures(file.fileno(), os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise UserError(f"{archive} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{archive}: {error}") from error
    seen: set[str] = set()
    for name, _, _ in members:
        if name in seen:
            raise UserError(f"{archive}: {name} is there twice, and one name must mean one picture: make the archive anew")
        seen.add(name)
    return members


def header_size(header: bytes) -> int | None:
    """The size that a member's header tells; None where these bytes are no header."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        return None


def picture_name(name: str) -> str | None:
    """The name as `find_pictures` would give it, or None for what it passes over. Raises UserError where it leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or not is_picture(parts[-1]):
        return None
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{name!r} leads out of the archive: make it anew, with names relative to the folder of the pictures")
    return None if any(part.startswith(".") for part in parts) else posixpath.join(*parts)


def _pictures(descriptor: int, end: int) -> Iterator[Member]:
    offset, last, said = 0, "", dict[str, str]()
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        if header == bytes(BLOCK):
            return
        where = f"behind {last!r}" if last else "at its beginning"
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            kind = "is cut short or damaged" if last else "is no tar archive, or a compressed one, or damaged"
            raise UserError(f"{kind} {where}, at byte {offset}: copy it again, or make it anew") from error
        offset += BLOCK
        if info.type in NOTES:
            size, what = info.size, f"a header {where}"
        else:
            name = said.get("path", info.name)
            # links, devices and folders have no content, whatever their size says
            size = 0 if info.type in tarfile.SUPPORTED_TYPES and info.type not in FILES else int(said.get("size", info.size))
            what = repr(name)
        if not 0 <= size <= end - offset:
            raise UserError(f"{what} claims {size} bytes, of which {end - offset} are there: it is cut short or damaged, copy it again")
        if info.type in NOTES:
            if info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                said |= _note(os.pread(descriptor, min(size, LONGEST_NOTE), offset), info.type, what)
        else:
            said, last = {}, name
            picture = None if info.type == tarfile.DIRTYPE else picture_name(name)
            if picture is not None:
                if info.type not in FILES:
                    raise UserError(f"{name!r} is a link, a device or a sparse file: make the archive anew, of plain files")
                yield Member(picture, offset, size)
        offset += -(-size // BLOCK) * BLOCK


def _note(note: bytes, kind: bytes, what: str) -> dict[str, str]:
    """What is said of the member that follows: its path and its size. Pax records are ``LENGTH KEY=VALUE`` and a line feed each."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(note.partition(b"\0")[0])}
    found, start = {}, 0
    while start < len(note):
        digits = note[start : start + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = note[start + len(digits) + 1 : start + length - 1].partition(b"=")
        if not equals or note[start + length - 1 : start + length] != b"\n":
            raise UserError(f"{what} is damaged: copy the archive again")
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = _text(value)
        start += length
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")

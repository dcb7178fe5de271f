"""Archives of all kinds, and of none: what is found in them is what tarfile finds, and nothing leads out of them or past their end."""

import io
import os
import posixpath
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gq_lightning.data.shards.tar import Member, member_name, picture_name, read_members
from gq_lightning.errors import UserError

CONTENT = {
    "a/1.png": b"one",
    "a/2.JPEG": b"",
    f"{'long/' * 40}3.png": bytes(512),
    "\u00fc/\u732b.jpg": bytes(range(256)) * 5,
    "no text \udcff.gif": b"x" * 513,
    "b/notes.txt": b"passed over",
    "b/._1.png": b"passed over",
    ".trash/1.png": b"passed over",
}
PICTURES = [name for name, content in CONTENT.items() if content != b"passed over"]


def write(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_where_tarfile_finds_them(format: int, tmp_path: Path) -> None:
    folder = special("a.png", tarfile.DIRTYPE, size=77)  # of which no byte follows
    path = write(tmp_path / "a.tar", folder, *CONTENT.items(), format=format)
    members = read_members(path)
    assert [member.name for member in members] == PICTURES
    content = path.read_bytes()
    assert [content[start : start + size] for _, _, start, size in members] == [CONTENT[name] for name in PICTURES]
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        assert [(info.name, info.offset, info.offset_data, info.size) for info in tar if info.name in PICTURES] == members


def test_ustar_prefix_and_global_header(tmp_path: Path) -> None:
    name = f"{'folder/' * 15}1.png"
    assert read_members(write(tmp_path / "a.tar", (name, b"1"), format=tarfile.USTAR_FORMAT)) == [Member(name, 0, 512, 1)]
    with tarfile.open(tmp_path / "b.tar", "w", pax_headers={"comment": "of all members"}) as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    assert read_members(tmp_path / "b.tar") == [Member("1.png", 1024, 1536, 0)]


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_the_tar_of_the_system(format: str, tmp_path: Path) -> None:
    names = [name for name in PICTURES if format in ("gnu", "pax") or "long" not in name]
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(CONTENT[name])
    call = ["tar", f"--format={format}", "-C", str(tmp_path / "root"), "-cf", str(tmp_path / "a.tar"), "."]
    subprocess.run(call, check=True, capture_output=True)
    members = read_members(tmp_path / "a.tar")
    assert sorted(member.name for member in members) == sorted(names), "without ./"
    content = (tmp_path / "a.tar").read_bytes()
    assert {name: content[start : start + size] for name, _, start, size in members} == {name: CONTENT[name] for name in names}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_members(path)
    message = str(caught.value)
    assert message.startswith(f"{path}") and "\n" not in message
    return message.removeprefix(f"{path}")


def test_names_that_lead_out(tmp_path: Path) -> None:
    for name in ("../1.png", "a/../../1.png", "a/../1.png", "/etc/1.png", "./../1.png"):
        message = refused(write(tmp_path / "a.tar", ("0.png", b"0"), special(name, tarfile.REGTYPE)))
        assert repr(name) in message and "leads out of the archive" in message
    assert read_members(write(tmp_path / "a.tar", ("./a//./1.png", b""), ("../notes.txt", b""))) == [Member("a/1.png", 0, 512, 0)]


def test_links_and_devices(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"):
        message = refused(write(tmp_path / "a.tar", special("a.png", kind, linkname="/etc/passwd", size=0)))
        assert message.startswith(": 'a.png' is a link, a device")
    assert read_members(write(tmp_path / "a.tar", special("a", tarfile.SYMTYPE, linkname="/etc"), ("1.png", b""))) == [
        Member("1.png", 512, 1024, 0)
    ]


def test_names_that_come_twice(tmp_path: Path) -> None:
    assert "a/1.png occurs twice" in refused(write(tmp_path / "a.tar", ("a/1.png", b"1"), ("./a/1.png", b"2")))


def test_sizes_that_the_archive_has_not(tmp_path: Path) -> None:
    for size in (2000, 2**33, 2**62):  # beyond 8 GB in GNU's binary form
        path = tmp_path / "a.tar"
        path.write_bytes(special("1.png", tarfile.REGTYPE, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert f"'1.png' claims {size} bytes, of which 1024 exist" in refused(path)
    header = bytearray(special("1.png", tarfile.REGTYPE, size=2**62).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12  # -1
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    path.write_bytes(bytes(header) + bytes(1024))
    assert "'1.png' claims -1 bytes" in refused(path)
    path.write_bytes(special("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert f"at its beginning, near byte 0 (a header of {2**40} bytes)" in refused(path)
    # a size of its own in the pax header, which goes before the header's
    path.write_bytes(special("1.png", tarfile.REGTYPE, pax_headers={"size": "99999"}).tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert "'1.png' claims 99999 bytes" in refused(path)


def test_huge_pax_fields(tmp_path: Path) -> None:
    for fields in ({"comment": "x" * (1 << 20)}, {"path": "x" * 5000 + ".png"}, {"SCHILY.xattr.user.a": "x" * (2 << 20)}):
        message = refused(write(tmp_path / "a.tar", ("0.png", b"0"), special("1.png", tarfile.REGTYPE, pax_headers=fields)))
        assert len(message) < 300 and ("(a header of " in message or "has 5004 characters" in message)
    fields = {"comment": "x" * 1000, "path": "a/" * 400 + "1.png"}
    assert read_members(write(tmp_path / "a.tar", special("1.png", tarfile.REGTYPE, pax_headers=fields)))[0].name == fields["path"]


def test_headers_before_headers_without_end(tmp_path: Path) -> None:
    note = special("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=2).tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(511)
    (tmp_path / "a.tar").write_bytes(note * 3000 + bytes(1024))
    assert "is not a tar archive" in refused(tmp_path / "a.tar")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "cannot be read: a named pipe, a device or a socket is not read" in refused(tmp_path / "a.tar")


NAMES = (
    *(
        "1.png",
        "a/b.jpg",
        "a.b/c.d.jpg",
        "a..png",
        "a.jpg.jpg",
        "a.JPG.jpg",
        "a.tar.gz.png",
        "v1.2/x.y.z.PNG",
        "a%.png",
        "a%2E.png",
        "a%252E.png",
    ),
    *(
        "a%2Ejpg.jpg",
        "a%25.png",
        "a%0A.png",
        "a\n.png",
        "a\tb/c\x7f.d.png",
        "%.2E.png",
        "%2.E.png",
        "%\n.png",
        "%2%2E.png",
        "no text \udcff.x.gif",
    ),
)


@pytest.mark.parametrize("alone", [True, False])
@given(st.text("a.%25E0/\n", max_size=12))
def test_names_in_archives_are_had_back(alone: bool, more: str) -> None:
    for name in (*NAMES, re.sub("/+", "/", f"x{more}y.png").replace("/.", "/a")):
        assert picture_name(member_name(name, alone)) == name
        assert not set(member_name(name, alone)) & set(map(chr, range(32)))
        assert posixpath.basename(member_name(name, alone)).count(".") == 1
    assert member_name("a/b-c_1.jpg", True) == "a/b-c_1.jpg", "most names are what they were"


def test_no_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    (tmp_path / "b.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "c.tar").touch()
    for name in ("a.tar", "b.tar", "c.tar"):
        assert "is not a tar archive, or is compressed" in refused(tmp_path / name)
    assert "cannot be read: No such file" in refused(tmp_path / "d.tar")
    (tmp_path / "e.tar").mkdir()
    assert "cannot be read: Is a directory" in refused(tmp_path / "e.tar")
    assert read_members(write(tmp_path / "f.tar")) == []


def test_a_torn_end_is_never_overlooked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *CONTENT.items())
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(info.offset_data + -(-info.size // 512) * 512 for info in tar)
    for cut in {*range(1, end + 512, 301), end, end + 511}:
        path.write_bytes(content[:cut])
        message = refused(path)
        assert "truncated" in message or cut < 512
    path.write_bytes(content[: end + 512])
    assert [member.name for member in read_members(path)] == PICTURES


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 11000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4), st.booleans())
def test_damage_is_an_error_or_within_bounds(tmp_path: Path, damage: list[tuple[int, bytes]], mended: bool) -> None:
    path = write(tmp_path / "a.tar", *CONTENT.items())
    content = bytearray(path.read_bytes())
    for place, wrong in damage:
        content[place : place + len(wrong)] = wrong
        if mended:  # with a checksum that is right, the fields themselves are to be read
            start = place // 512 * 512
            header = content[start : start + 512]
            content[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    path.write_bytes(content)
    try:
        members = read_members(path)
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    for name, begin, start, size in members:
        assert 0 <= begin < start - 511
        assert 512 <= start <= start + size <= len(content)
        assert not name.startswith("/") and ".." not in name.split("/")
    assert len({member.name for member in members}) == len(members)
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]

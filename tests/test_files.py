"""How a file is written: whole, or not at all, whoever else writes it and whoever is killed meanwhile."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gq_lightning import UserError
from gq_lightning.files import Draft, whole_file, write_whole

# writes half of the file, says so, and waits to be killed
HALF = """
import sys, time
from pathlib import Path
from gq_lightning.files import whole_file

with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    time.sleep(100)
"""


def begun(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("name", ["a", ".hidden", "two\nlines", "[a-z]*", "ä" * 127, os.fsdecode(b"no text \xff")])
def test_round_trip(tmp_path: Path, name: str) -> None:
    path = tmp_path / "made" / name
    for content in (b"", b"first", bytes(range(256)) * 1000):
        write_whole(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_does_not_end_well_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_several_files_are_placed_when_all_are_complete(tmp_path: Path) -> None:
    with Draft(tmp_path / "a") as first, Draft(tmp_path / "b") as second:
        for draft in (first, second):
            draft.file.write(b"new")
            draft.complete()
        assert not (tmp_path / "a").exists()
        first.place()
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "the second one was not placed"


def test_concurrent_writers(tmp_path: Path) -> None:
    """Each writes other bytes, in pieces: what is read is always all of one of them."""
    path, rounds, errors = tmp_path / "a", 60, list[str]()
    write_whole(path, b"0" * 50_000)

    def write(digit: bytes) -> None:
        for _ in range(rounds):
            with whole_file(path) as file:
                for _ in range(50):
                    file.write(digit * 1000)
                    file.flush()

    def read() -> None:
        while any(writer.is_alive() for writer in writers):
            content = path.read_bytes()
            if len(content) != 50_000 or len(set(content)) != 1:
                errors.append(f"{len(content)} bytes, {set(content)}")

    writers = [threading.Thread(target=write, args=(digit,)) for digit in (b"1", b"2", b"3")]
    reader = threading.Thread(target=read)
    for thread in [*writers, reader]:
        thread.start()
    for thread in [*writers, reader]:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_writer_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    kill(begun(path))
    assert path.read_bytes() == b"old"
    [left] = set(tmp_path.iterdir()) - {path}
    assert left.read_bytes() == b"half"
    (tmp_path / ".a.tmp").write_bytes(b"somebody else's")
    write_whole(tmp_path / "b", b"another file")
    assert left.exists()
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert {each.name for each in tmp_path.iterdir()} == {"a", "b", ".a.tmp"}


def test_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process = begun(path)
    [theirs] = tmp_path.iterdir()
    write_whole(path, b"ours")
    assert set(tmp_path.iterdir()) == {path, theirs} and theirs.read_bytes() == b"half"
    kill(process)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", b"")
        (tmp_path / "b").write_bytes(b"")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    assert modes == {0o666 & ~mask}


def test_no_room(tmp_path: Path) -> None:
    """The kernel itself refuses to write on: here since the file would be larger than allowed."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*/a: File too large: make room"):
            write_whole(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^cannot write .*/file/a: (Not a directory|File exists): make room"):
        write_whole(tmp_path / "file" / "a", b"new")
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path = tmp_path / "closed" / "a"
    write_whole(path, b"old")
    path.parent.chmod(0o555)
    with pytest.raises(UserError, match=r"^cannot write .*/closed/a: Permission denied: "):
        write_whole(path, b"new")
    path.parent.chmod(0o755)
    assert path.read_bytes() == b"old"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written all the same; what may be another's is left alone."""
    kill(begun(tmp_path / "a"))

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2

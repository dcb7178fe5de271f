"""A folder to shards: bytes unchanged, whole or not at all."""

import logging
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from gq_lightning.cli.main import main
from gq_lightning.data.pictures.index import unsealed
from gq_lightning.data.shards import writing as sharding
from gq_lightning.data.shards.module import read_shard
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.errors import UserError

BROKEN = {"b/05.png": "the file is empty", "b/11.png": "not a picture in a known format"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures of some kB each and a file that is none, two of them broken, in names of all kinds."""
    for index in range(20):
        path = tmp_path / "folder" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "folder" / "b" / "05.png").write_bytes(b"")
    (tmp_path / "folder" / "b" / "11.png").write_bytes(b"text" * 100)
    (tmp_path / "folder" / "b" / "19.png").rename(
        tmp_path / "folder" / "b" / f"{'long' * 40}\u732b {os.fsdecode(b'%ff' + bytes([255]))}.PNG"
    )
    (tmp_path / "folder" / "notes.txt").write_text("none")
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.[pP][nN][gG]"))}


def unpacked(out: Path) -> dict[str, bytes]:
    """What a reader of tar finds, in the order of the shards."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                assert info.isreg() and (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
                found[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return found


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_round_trip(folder: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    written = write_shards(folder, out, "some", megabytes=0.02, workers=workers)
    expected = contents(folder)
    assert written.left_out == BROKEN and written.pictures == 18
    assert [record.getMessage() for record in caplog.records] == [
        f"left out a broken picture: {folder / name}: {reason}" for name, reason in BROKEN.items()
    ]
    assert list(unpacked(out).items()) == sorted((name, content) for name, content in expected.items() if name not in BROKEN)
    names = sorted(os.listdir(out))
    assert names == sorted(f"some-{number:06d}.{kind}" for number in range(written.shards) for kind in ("tar", "json"))
    assert written.shards >= 4
    for path in out.glob("*.tar"):
        index = unsealed(path.with_suffix(".json").read_bytes())
        assert index["size"] == path.stat().st_size <= 20_000 + 10_240
        content = path.read_bytes()
        assert all(content[start : start + size] == expected[name] for name, _, start, size, _ in index["members"])
        # GNU tar names every file, reads to the end and finds nothing to complain of
        listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True)
        assert len(listed.stdout.splitlines()) == len(index["members"]) and not listed.stderr
    assert write_shards(folder, tmp_path / "again", "some", megabytes=0.02, workers=0) == written
    assert files(tmp_path / "again") == files(out), "the same bytes"


def test_broken_pictures_may_be_kept(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(folder)
    (folder / "a" / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "a" / "pipe.png")
    kept = write_shards(folder, tmp_path / "kept", broken="keep", workers=0)
    assert kept.left_out == {"a/gone.png": "No such file or directory", "a/pipe.png": "a named pipe, a device or a socket is not read"}
    messages = [record.getMessage().partition(str(folder))[0] for record in caplog.records]
    assert messages == ["left out a broken picture: "] * 2 + ["kept a broken picture: "] * 2
    caplog.clear()
    unchecked = write_shards(folder, tmp_path / "unchecked", broken="unchecked", workers=0)
    assert unchecked == kept and len(caplog.records) == 2
    assert files(tmp_path / "kept") == files(tmp_path / "unchecked")
    assert unpacked(tmp_path / "kept") == before


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_finds_one_sample_a_picture(tmp_path: Path) -> None:
    """By its own reader, to which all files with one name up to the first dot are one sample."""
    pictures = {}
    for index, name in enumerate(
        (
            "a.png",
            "a.jpg",
            "a.v1.png",
            "a.v2.png",
            "v.1/b.png",
            "v.1/b.x.y.PNG",
            "a.png.png",
            "c%2Ed.png",
            "c.d.png",
            "e\nf.png",
            "g/h\n/i.png",
        )
    ):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "folder" / name, format="PNG")
        pictures[name] = (tmp_path / "folder" / name).read_bytes()
    write_shards(tmp_path / "folder", tmp_path / "out", workers=0)
    (shard,) = (tmp_path / "out").glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False))
    assert sorted(read_shard(shard).names) == sorted(pictures)
    found = [[value for key, value in sample.items() if not key.startswith("__")] for sample in samples]
    assert sorted(found) == sorted([content] for content in pictures.values())
    assert len({sample["__key__"] for sample in samples}) == len(pictures)
    shard.with_suffix(".json").unlink()
    assert sorted(read_shard(shard).names) == sorted(pictures), "without an index, too"


@pytest.mark.parametrize("moment", ["reading", "the index", "the shard", "the disk is full"])
def test_an_interrupted_call_goes_on(folder: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(folder, tmp_path / "whole", megabytes=0.02, workers=0)
    calls, replace, load = [0], os.replace, sharding.load_picture

    def stop(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == {"reading": 9, "the index": 5, "the shard": 6, "the disk is full": 4}[moment]:
            raise OSError(28, "No space left on device") if moment == "the disk is full" else KeyboardInterrupt
        return load(*arguments) if moment == "reading" else replace(*arguments)  # type: ignore[arg-type, func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "load_picture", stop) if moment == "reading" else patch.setattr("os.replace", stop)
        error = "No space left on device: make room" if moment == "the disk is full" else ""
        with pytest.raises(UserError if error else KeyboardInterrupt, match=error or None):
            write_shards(folder, tmp_path / "out", megabytes=0.02, workers=0)
    left = files(tmp_path / "out")
    assert left and set(left) < set(files(tmp_path / "whole")), "no file under a temporary name"
    finished = {name: (tmp_path / "out" / name).stat().st_ino for name in left if name.endswith(".tar")}
    assert finished
    written = write_shards(folder, tmp_path / "out", megabytes=0.02, workers=0)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (written.pictures, written.left_out) == (18, BROKEN)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished, "what was finished is left alone"


def test_shards_of_other_pictures_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = write_shards(folder, out, megabytes=0.02, workers=0)
    assert write_shards(folder, out, megabytes=0.02, workers=0) == written
    write_shards(folder, out, "val", workers=0)  # beside the others
    (folder / "a" / "00.png").rename(folder / "a" / "000.png")
    with pytest.raises(UserError, match=r"train-000000\.tar has other pictures than expected from .*choose another --out"):
        write_shards(folder, out, workers=0)
    (folder / "a" / "000.png").rename(folder / "a" / "00.png")
    (out / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar has other pictures"):
        write_shards(folder, out, workers=0)


def test_pictures_that_are_too_large(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert write_shards(folder, tmp_path / "out", megabytes=0.001, workers=0).shards == 18
    assert [len(read_shard(path).names) for path in (tmp_path / "out").glob("*.tar")] == [1] * 18
    monkeypatch.setattr(sharding, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"none of the 20 pictures of .* could be read: nothing was written"):
        write_shards(folder, tmp_path / "none", workers=0)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("too many bytes for a picture" in message for message in messages) == 18
    # a log in UTF-8 takes them all, a name that is no text too
    assert any("\\udcff" in message for message in messages) and all(message.encode() for message in messages)
    assert list((tmp_path / "none").iterdir()) == []


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    logger, handler = logging.getLogger("gq_lightning.data"), logging.StreamHandler()
    logger.addHandler(handler)
    assert main(["shard", str(folder), "--out", str(out), "--size", "0.02", "--workers", "1"]) == 0
    logger.removeHandler(handler)
    captured = capfd.readouterr()
    count = len(list(out.glob("*.tar")))
    assert captured.out == f"{out}: {count} shards of 18 pictures, 2 broken ones left out\n"
    assert captured.err.count("left out a broken picture") == 2
    for wrong in (["--size", "0"], ["--workers", "-1"], ["--split", "../train"], ["--split", ""]):
        assert main(["shard", str(folder), "--out", str(out), *wrong]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {wrong[0]}") or (wrong[0] == "--workers" and "--workers -1" in error)
    assert main(["shard", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "nowhere is not a folder" in capfd.readouterr().err
    (tmp_path / "file").touch()
    assert main(["shard", str(folder), "--out", str(tmp_path / "file")]) == 2
    assert f"cannot write {tmp_path / 'file'}" in capfd.readouterr().err

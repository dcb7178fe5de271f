"""The index of a large folder: quick, and never wrong."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from gq_lightning.data import ImageFolder, ImageNet
from gq_lightning.data.pictures import listing
from gq_lightning.data.pictures.index import keep, recall
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.errors import UserError

LONG_AGO = time.time_ns() - 3600 * 10**9


def settle(root: Path) -> None:
    """As if nothing had changed for an hour."""
    for current, _, _ in os.walk(root):
        os.utime(current, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(listing, "LARGE", 2)
    root = tmp_path / "root"
    for name in ("b/2.png", "a/1.png", "a/c/3.JPEG", "a/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories of pictures that are listed from now on; that of the kept listings is none."""
    listed: list[str] = []
    scandir = os.scandir

    def watched(path: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
        if not str(path).endswith("listings"):
            listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", watched)
    return listed


NAMES = ["a/1.png", "a/c/3.JPEG", "b/2.png"]


def test_the_next_listing_asks_only_for_times(root: Path, listed: list[str], tmp_path: Path) -> None:
    assert list_pictures(root) == NAMES
    assert len(listed) == 4
    listed.clear()
    (tmp_path / "link").symlink_to(root)
    for path in (root, root / ".." / "root", tmp_path / "link"):
        assert list_pictures(path) == NAMES
    assert listed == []
    assert len(list((tmp_path / "home" / "listings").iterdir())) == 1


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "added": (lambda root: (root / "a" / "c" / "4.png").touch(), ["a/1.png", "a/c/3.JPEG", "a/c/4.png", "b/2.png"]),
    "removed": (lambda root: (root / "a" / "c" / "3.JPEG").unlink(), ["a/1.png", "b/2.png"]),
    "renamed": (lambda root: (root / "b" / "2.png").rename(root / "b" / "0.png"), ["a/1.png", "a/c/3.JPEG", "b/0.png"]),
    "moved": (lambda root: (root / "a" / "c").rename(root / "c"), ["a/1.png", "b/2.png", "c/3.JPEG"]),
    "another folder in its place": (
        lambda root: ((root / "b").rename(root.parent / "b"), (root / "b").mkdir(), (root / "b" / "9.png").touch()),
        ["a/1.png", "a/c/3.JPEG", "b/9.png"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str, root: Path, listed: list[str]) -> None:
    list_pictures(root)
    listed.clear()
    act, expected = CHANGES[change]
    act(root)
    assert list_pictures(root) == expected
    assert len(listed) <= 3, "the others are as they were"
    settle(root)
    assert list_pictures(root) == expected
    listed.clear()
    assert list_pictures(root) == expected
    assert listed == []


def test_a_folder_in_anothers_place_with_its_time(root: Path) -> None:
    list_pictures(root)
    CHANGES["another folder in its place"][0](root)
    settle(root)
    assert "b/9.png" in list_pictures(root)


def test_a_folder_that_has_just_changed_is_not_believed(root: Path) -> None:
    (root / "b" / "3.png").touch()
    now = os.stat(root / "b").st_mtime_ns
    assert "b/3.png" in list_pictures(root)
    (root / "b" / "4.png").touch()
    os.utime(root / "b", ns=(now, now))  # both within one tick of the file system's clock
    assert "b/4.png" in list_pictures(root)


def test_links(root: Path, tmp_path: Path) -> None:
    (root / "later").symlink_to(tmp_path / "later")
    settle(root)
    assert list_pictures(root) == NAMES
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "1.png").touch()
    settle(tmp_path / "later")
    assert list_pictures(root) == [*NAMES, "later/1.png"]
    (tmp_path / "later").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"root/later cannot be listed: No such file or directory"):
        list_pictures(root)
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "later").unlink()
    assert list_pictures(root) == [*NAMES, "circle.png"]


@pytest.mark.parametrize("damage", ["torn", "bit", "path", "version", "empty"])
def test_a_damaged_index_is_made_anew(damage: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_pictures(root)
    (file,) = (tmp_path / "home" / "listings").iterdir()
    content = file.read_bytes()
    if damage == "path":
        (tmp_path / "other").mkdir()
        keep(tmp_path / "other", {"": [LONG_AGO, 0, [], ["x.png"]]})
        (other,) = (path for path in file.parent.iterdir() if path != file)
        os.replace(other, file)
    elif damage == "version":
        monkeypatch.setattr("gq_lightning.data.pictures.index.VERSION", 0)
        keep(root, "another shape")
        monkeypatch.undo()
        monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(listing, "LARGE", 2)
    else:
        changed = {"torn": content[:-20], "bit": content.replace(b"1.png", b"0.png"), "empty": b""}[damage]
        assert changed != content
        file.write_bytes(changed)
    assert recall(root) is None
    assert list_pictures(root) == NAMES
    assert file.read_bytes() == content
    assert json.loads(content.partition(b"\n")[2])["path"] == str(root)


def test_names_that_are_no_text(root: Path, listed: list[str]) -> None:
    (root / "b" / os.fsdecode(b"\xff\xe9.png")).touch()
    settle(root)
    names = [*NAMES, "b/\udcff\udce9.png"]
    assert list_pictures(root) == names
    listed.clear()
    assert list_pictures(root) == names
    assert listed == []


def test_no_place_for_the_index(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path / "file"))
    assert list_pictures(root) == NAMES
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{root} will be listed again at each start: cannot write {tmp_path / 'file'}")
    assert "GQ_LIGHTNING_HOME" in record.getMessage() and "--out" not in record.getMessage()


def test_small_folders_leave_no_index(root: Path, tmp_path: Path) -> None:
    (root / "b" / "2.png").unlink()
    (root / "a" / "1.png").unlink()
    assert list_pictures(root) == ["a/c/3.JPEG"]
    assert not (tmp_path / "home").exists()


def test_progress_without_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    list_pictures(root)
    assert capsys.readouterr().err == "", "nothing is said of what takes no time"
    (root / "b" / "3.png").touch()
    monkeypatch.setattr("gq_lightning.data.pictures.progress.EVERY", 0)
    list_pictures(root)
    assert capsys.readouterr().err.splitlines() == [f"listing {root}, pictures: 2"]


@pytest.mark.parametrize("layout", ["imagenet", "folder", "two folders"])
def test_one_process_lists_for_all(layout: str, root: Path, listed: list[str], tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (9, 9), (index, len(name), 0)).save(tmp_path / name / f"{index}.png")
        settle(tmp_path / name)

    def data() -> ImageNet | ImageFolder:
        if layout == "imagenet":
            return ImageNet(str(tmp_path), image_size=8)
        return ImageFolder(str(tmp_path / "train"), str(tmp_path / "val") if layout == "two folders" else None, image_size=8)

    data().prepare_data()
    listed.clear()
    other = data()
    assert len(other.training_set()) + len(other.evaluation_set()) == (4 if layout == "folder" else 8)
    assert listed == []
    ImageNet(str(tmp_path / "nowhere")).prepare_data()  # what is asked for says what is missing

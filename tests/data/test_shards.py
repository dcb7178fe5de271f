"""Pictures in shards are the pictures of the folder: the same names, split, order and crops, to the bit."""

import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import BrokenImage, ImageFolder, Shards
from gq_lightning.data.pictures.index import sealed, unsealed
from gq_lightning.data.pictures.reading import load_picture
from gq_lightning.data.sets import CenterCrop, fingerprint
from gq_lightning.data.shards import module as shards
from gq_lightning.data.shards.module import ShardSet, read_shard
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.errors import UserError

COUNT = 40
SIZES = {"image_size": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/ with pictures of two sizes, and its shards/, six pictures in each."""
    root = tmp_path_factory.mktemp("shards")
    for index in range(COUNT):
        path = root / "folder" / f"class{index % 3}" / f"{index}.{('jpg', 'png')[index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 255, (18 + index % 2, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    write_shards(root / "folder", root / "shards", megabytes=0.008, workers=0)
    assert len(list((root / "shards").glob("train-*.tar"))) > 3
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be spoilt."""
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path / "home"))
    shutil.copytree(made / "shards", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archives whose headers are gone through from now on."""
    scanned: list[str] = []
    read = shards.read_members
    monkeypatch.setattr(shards, "read_members", lambda path: scanned.append(path.name) or read(path))
    return scanned


def every(root: Path) -> ShardSet:
    return ShardSet([read_shard(path) for path in sorted(root.glob("*.tar"))], None, CenterCrop(16), "all")


def test_splits_names_pixels_and_fingerprint_are_the_folders(made: Path, scanned: list[str]) -> None:
    folder, data = (
        ImageFolder(str(made / "folder"), validation_share=0.2, **SIZES),
        Shards(str(made / "shards"), validation_share=0.2, **SIZES),
    )  # type: ignore[arg-type]
    for theirs, ours in ((folder.training_set(), data.training_set()), (folder.evaluation_set(), data.evaluation_set())):
        assert [ours.name(index) for index in range(len(ours))] == [theirs.name(index) for index in range(len(theirs))]
        assert fingerprint(ours) == fingerprint(theirs)
    assert 2 < len(folder.evaluation_set()) < COUNT / 2
    evaluated = torch.cat(list(data.val_dataloader()))
    assert torch.equal(evaluated, torch.cat(list(folder.val_dataloader())))
    ours, theirs = data.protocol(), folder.protocol()
    assert ours.pop("data") == "Shards" and ours.pop("split") == "0.2 of shards by hashed name"
    assert ours.items() <= theirs.items()
    assert scanned == [], "the indexes are believed"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_its_resuming_are_the_folders(made: Path, workers: int) -> None:
    def data(kind: type[ImageFolder] | type[Shards]) -> ImageFolder | Shards:
        torch.manual_seed(1)
        return kind(str(made / ("folder" if kind is ImageFolder else "shards")), workers=workers, **SIZES)  # type: ignore[arg-type]

    loader, ours = data(ImageFolder).train_dataloader(), data(Shards)
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    batches = iter(ours.train_dataloader())
    for start in (0, 4):
        assert torch.equal(next(batches), first[start : start + 4])
    resumed = data(Shards)
    resumed.load_state_dict(ours.state_dict())
    loader = resumed.train_dataloader()
    assert torch.equal(torch.cat(list(loader)), first[8:])
    assert torch.equal(torch.cat(list(loader)), second)


def test_archives_of_other_tools(root: Path, scanned: list[str], made: Path) -> None:
    expected = [every(root).name(index) for index in range(COUNT)]
    for path in root.glob("*.json"):
        path.unlink()
    with tarfile.open(root / "train-000000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("class0/0.cls"))
        tar.addfile(tarfile.TarInfo("class0/0.heic"))
    count = len(list(root.glob("*.tar")))
    data = Shards(str(root), **SIZES)  # type: ignore[arg-type]
    data.prepare_data()
    assert len(scanned) == count
    pictures = every(root)
    assert [pictures.name(index) for index in range(COUNT)] == expected
    assert len(data.training_set()) + len(data.evaluation_set()) == COUNT
    assert len(scanned) == count, "by the other processes and from then on it is read from the index"
    os.utime(root / "train-000001.tar")
    every(root)
    assert scanned[count:] == ["train-000001.tar"]


def content_of(index: Path) -> dict[str, Any]:
    return unsealed(index.read_bytes())


def first(content: dict[str, Any], *place: Any) -> bytes:
    """Sealed well, with one picture at that place."""
    return sealed(content | {"members": [list(place)]})


INDEXES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "torn": lambda index: sealed(index)[:-9],
    "empty": lambda index: b"",
    "another size": lambda index: sealed(index | {"size": 512}),
    "another format": lambda index: sealed(index | {"format": "gq_lightning shard 3"}),
    "beyond the end": lambda index: first(index, "a.png", 0, 512, 2**40, 1),
    "before the beginning": lambda index: first(index, "a.png", -512, 0, 4, 1),
    "no header": lambda index: first(index, "a.png", 512, 512, 4, 1),
    "backwards": lambda index: first(index, "a.png", 0, 1024, -4, 1),
    "leads out": lambda index: first(index, "a/../../b.png", 0, 512, 4, 1),
    "absolute": lambda index: first(index, "/b.png", 0, 512, 4, 1),
    "no name": lambda index: first(index, "", 0, 512, 4, 1),
    "no text": lambda index: first(index, "\ud800.png", 0, 512, 4, 1),
    "a number for a name": lambda index: first(index, 5, 0, 512, 4, 1),
    "a list for a name": lambda index: first(index, ["a.png"], 0, 512, 4, 1),
    "too few numbers": lambda index: first(index, "a.png", 512, 4),
    "more than 64 bits": lambda index: first(index, "a.png", 0, 2**63, 4, 1),
    "near 64 bits": lambda index: first(index, "a.png", 0, 2**63 - 1, 2**63 - 1, 1),
    "hidden": lambda index: first(index, "a/.b.png", 0, 512, 4, 1),
    "zero byte": lambda index: first(index, "a\0b.png", 0, 512, 4, 1),
    "infinite": lambda index: first(index, "a.png", 0, float("inf"), 4, 1),
    "twice": lambda index: sealed(index | {"members": [["a.png", 0, 512, 4, 1], ["a.png", 0, 512, 4, 1]]}),
    "no members": lambda index: sealed(index | {"members": 3}),
    "nothing left out": lambda index: sealed(index | {"left_out": []}),
    "a list": lambda index: sealed([1]),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_wrong_is_named_and_not_believed(
    kind: str, root: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "train-000001.json"
    path.write_bytes(INDEXES[kind](content_of(path)))
    pictures = every(root)
    assert scanned == ["train-000001.tar"] and len(pictures) == COUNT
    assert all(pictures[index].shape == (3, 16, 16) for index in range(COUNT))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} is ") and "`python -m gq_lightning shard`" in line


@pytest.mark.parametrize("content", [b'{"statistics": 1}', b"[1]"])
def test_a_file_of_another_tool_beside_a_shard(content: bytes, root: Path, scanned: list[str], caplog: pytest.LogCaptureFixture) -> None:
    (root / "train-000001.json").write_bytes(content)
    assert len(every(root)) == COUNT and scanned == ["train-000001.tar"] and not caplog.records


def test_any_flipped_bit_of_an_index_is_noticed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "train-000001.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        caplog.clear()
        read_shard(root / "train-000001.tar")
        assert [record.getMessage().startswith(f"{path} is damaged") for record in caplog.records] == [True], place


def test_any_flipped_bit_of_a_picture_is_noticed(root: Path) -> None:
    """Headers, names and pixels; what fills up blocks has no meaning."""
    path = root / "train-000000.tar"
    content, shard = path.read_bytes(), read_shard(path)
    for place in range(0, int(shard.places[-1, 1] + shard.places[-1, 2]), 41):
        inside = (shard.places[:, 0] <= place) & (place < shard.places[:, 1] + shard.places[:, 2])
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        pictures, named = every(root), []
        for index in range(len(shard.names)):
            try:
                pictures[index]
            except BrokenImage as error:
                named.append(index)
                assert str(error).startswith(f"{path}: {shard.names[index]}: ")
        assert named == np.flatnonzero(inside).tolist(), place


def test_an_index_of_the_older_form(root: Path, scanned: list[str], caplog: pytest.LogCaptureFixture, made: Path) -> None:
    path = root / "train-000001.json"
    before = content_of(path)
    members = [[name, offset, size] for name, _, offset, size, _ in before["members"]]
    old = {"format": "gq_lightning shard 1", "size": before["size"], "members": members, "left_out": {}}
    path.write_text(json.dumps(old))
    assert len(every(root)) == COUNT and scanned == ["train-000001.tar"]
    assert f"{path} has the older format, without checksums; the archive is read without it: `python -m gq" in caplog.text
    write_shards(made / "folder", root, megabytes=0.008, workers=0)
    assert path.read_bytes() == (made / "shards" / "train-000001.json").read_bytes()


def test_a_shard_that_is_not_what_its_index_says(root: Path) -> None:
    pictures = every(root)
    content = (root / "train-000000.tar").read_bytes()
    assert pictures[0].shape == (3, 16, 16)
    start = int(pictures._places[1, 1])
    (root / "train-000000.tar").write_bytes(content[: start - 512] + bytes(512) + content[start:])
    with pytest.raises(BrokenImage, match=r"train-000000\.tar: class0/12\.jpg: is not at its position in the index"):
        pictures[1]
    (root / "train-000000.tar").write_bytes(content[: start + 4] + b"#" * 40 + content[start + 44 :])
    with pytest.raises(BrokenImage, match=r"train-000000\.tar: class0/12\.jpg: differs from its checksum in the index"):
        pictures[1]
    assert pictures[0].shape == (3, 16, 16), "the others are what they were"
    (root / "train-000000.tar").write_bytes(content[: start + 4])
    with pytest.raises(BrokenImage, match="is not at its position in the index"):
        pictures[1]
    with pytest.raises(UserError, match=r"train-000000\.tar: .*truncated or damaged"):
        every(root)


def test_an_archive_under_the_index_of_another(root: Path) -> None:
    """Of the same size, with a picture at the same place: the names are compared."""
    for name in ("one", "two"):
        (root / name).mkdir()
        Image.new("RGB", (16, 16), "red").save(root / name / f"{name}.png")
        write_shards(root / name, root, name, workers=0)
    shutil.copy(root / "two-000000.tar", root / "one-000000.tar")
    with pytest.raises(BrokenImage, match=r"one-000000\.tar: one\.png: is not at its position in the index"):
        ShardSet([read_shard(root / "one-000000.tar")], None, CenterCrop(16), "all")[0]


def test_a_shard_that_vanishes(root: Path) -> None:
    pictures = every(root)
    (root / "train-000000.tar").unlink()
    with pytest.raises(BrokenImage, match=r"train-000000\.tar: class0/0\.jpg: No such file"):
        pictures[0]
    assert pictures[COUNT - 1].shape == (3, 16, 16)
    with pytest.raises(UserError, match=r"nowhere\.tar cannot be read: No such file"):
        read_shard(root / "nowhere.tar")


def test_broken_pictures_are_named_by_shard_and_member(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = b"P6 1 1000000 255 " + bytes(3_000_000)
    with tarfile.open(root / "val-0.tar", "w") as tar:
        for name, content in (("thin.ppm", picture), ("none.png", b""), ("text.png", b"text")):
            (root / "file").write_bytes(content)
            tar.add(root / "file", name)
    data = Shards(str(root), validation="val-*.tar", skip_broken=False, **SIZES)  # type: ignore[arg-type]
    pictures = data.evaluation_set()
    with pytest.raises(BrokenImage, match=r"val-0\.tar: none\.png: the file is empty$"):
        pictures[1]
    with pytest.raises(BrokenImage, match=r"val-0\.tar: text\.png: not a picture"):
        pictures[2]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(BrokenImage, match=r"val-0\.tar: thin\.ppm: too long and thin to be a picture: 1 x 1000000 pixels"):
        pictures[0]
    monkeypatch.setattr(shards, "LARGEST", 1_000_000)
    with pytest.raises(BrokenImage, match=r"val-0\.tar: thin\.ppm: 3000017 bytes are too many"):
        pictures[0]


def test_equal_names_in_two_shards(root: Path) -> None:
    shutil.copy(root / "train-000000.tar", root / "train-000099.tar")
    pictures = every(root)
    names = [pictures.name(index) for index in range(len(pictures))]
    assert len(set(names)) == len(names) > COUNT
    assert {"train-000000.tar/class0/0.jpg", "train-000099.tar/class0/0.jpg"} < set(names)
    data = Shards(str(root), **SIZES)  # type: ignore[arg-type]
    twice = {name.partition("/")[2] for name in names if name.startswith("train-000099")}
    evaluated = [data.evaluation_set().name(index).partition("/")[2] for index in range(len(data.evaluation_set()))]
    left_out = sum(name in twice for name in evaluated) - 2 * sum(evaluated.count(name) == 2 for name in twice)
    assert len(data.training_set()) + len(data.evaluation_set()) + left_out == len(names)


def test_few_files_are_open_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = every(root)
    expected = [pictures[index] for index in range(COUNT)]
    assert len(pictures._open) == len(pictures.paths)
    monkeypatch.setattr("os.sysconf", lambda name: 4)
    few = every(root)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for index in (*range(COUNT), *range(0, COUNT, 7)):
        assert torch.equal(few[index], expected[index])
        assert len(few._open) <= 2
    copy = pickle.loads(pickle.dumps(few))
    assert torch.equal(copy[3], expected[3]) and len(copy._open) == 1
    del few, copy
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_missing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards has no val-\*\.tar: write shards there with `python -m gq_lightning shard`"):
        Shards(str(root), validation="val-*.tar").val_dataloader()
    with pytest.raises(UserError, match=r"'/etc/\*\.tar' is not a pattern of names below"):
        Shards(str(root), training="/etc/*.tar").train_dataloader()
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=r"data.validation_share"):
            Shards(str(root), validation_share=share)
    (tmp_path / "few").mkdir()
    tarfile.open(tmp_path / "few" / "train-0.tar", "w").close()
    data = Shards(str(tmp_path / "few"))
    data.prepare_data()
    with pytest.raises(UserError, match="no pictures in these 1 archives"):
        data.training_set()
    with tarfile.open(tmp_path / "few" / "train-0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(UserError, match="no pictures left to train on"):
        data.training_set()


def test_load_picture_of_a_file_object(made: Path) -> None:
    path = made / "folder" / "class0" / "0.jpg"
    with path.open("rb") as file:
        assert load_picture(file).tobytes() == load_picture(path).tobytes()

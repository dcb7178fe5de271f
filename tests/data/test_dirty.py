"""A thousand pictures of which a hundred are broken, in all the ways that downloads and disks have."""

import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from small import CONFIGS, small_tokenizer, small_training
from torch import Tensor

from gq_lightning.callbacks import BrokenPictures
from gq_lightning.cli.main import main
from gq_lightning.data import BrokenImage, ImageFolder, Shards, loading
from gq_lightning.data.loading import Guarded
from gq_lightning.data.sets import CenterCrop, FileSet, PictureSet
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.errors import UserError
from gq_lightning.evaluation.evaluate import some_images

COUNT, EVERY = 1000, 10


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def spoil(path: Path, way: int) -> Path:
    """Breaks a PNG or JPEG picture."""
    content = path.read_bytes()
    if way == 0:
        path.write_bytes(content[: len(content) // 2])
    elif way == 1:
        path.write_bytes(b"")
    elif way == 2:
        path.write_text("<html>404 Not Found</html>")
    elif way == 3:
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + content[33:])
    elif way == 4:
        path.write_bytes(png_header(60_000, 60_000) + content[33:])
    elif way == 5:
        path.unlink()
        path.symlink_to(path.with_name("nowhere.png"))
    elif way == 6 and os.geteuid() != 0:  # root reads it all the same
        path.chmod(0)
    else:
        # a hole in the middle, behind which checksums are wrong
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(path, format="PNG")
        content = path.read_bytes()
        path.write_bytes(content[:400] + content[800:])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The folder of the dirty thousand, with a clean one beside it, and the names of those that are broken."""
    root = tmp_path_factory.mktemp("dirty")
    (root / "all").mkdir()
    (root / "clean").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((40, 36))
    modes = ("RGB", "CMYK", "L", "1", "P", "RGBA", "LA", "I;16")
    broken = set()
    for index in range(COUNT):
        mode = modes[index % len(modes)]
        suffix = {"RGB": ("jpg", "JPEG", "png")[index % 3], "CMYK": "jpg"}.get(mode, "png")
        path = root / "all" / f"{index:04d}.{suffix}"
        (picture.convert("L").convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)).save(path)
        with path.open("ab") as file:
            file.write(index.to_bytes(2, "big"))  # what follows a picture is not read, but no two are the same
        if index % EVERY == 3:
            broken.add(spoil(path, index // EVERY % 8).name)
    picture.save(root / "clean" / "0.png")
    # a folder is a folder, whatever it is called
    (root / "all" / "folder.jpg").mkdir()
    assert len(broken) == COUNT // EVERY
    return root, broken


def test_training_goes_on_and_names_each_once(folder: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, broken = folder
    data = ImageFolder(str(root / "all"), str(root / "clean"), image_size=32, batch_size=20, workers=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[BrokenPictures()],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (tmp_path / "broken_pictures.txt").write_text("training folder: found before the training was resumed.png\n")
    trainer.fit(small_training("vit"), data)
    assert trainer.global_step == COUNT // 20
    assert data.skipped == len(broken)
    lines = (tmp_path / "broken_pictures.txt").read_text().splitlines()
    assert lines == sorted(f"training folder: {name}" for name in broken | {"found before the training was resumed.png"})
    assert [path.name for path in tmp_path.iterdir()] == ["broken_pictures.txt"]


def test_evaluation(folder: tuple[Path, set[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, broken = folder
    small_tokenizer("vit").save_pretrained(tmp_path / "tokenizer")
    call = ["evaluate", "--tokenizer", str(tmp_path / "tokenizer"), "--data", str(root / "all"), "--out", str(tmp_path / "metrics.json")]
    call += ["--no-rfid", "--batch-size", "50", "--workers", "2", "--threads", "1"]
    assert main(call) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith(f"error: {root / 'all' / min(broken)}: ") and "\n" not in error
    # where nobody has configured logging Python writes warnings to standard error, pytest keeps them
    logger, handler = logging.getLogger("gq_lightning.data"), logging.StreamHandler()
    logger.addHandler(handler)
    assert main([*call, "--skip-broken"]) == 0
    logger.removeHandler(handler)
    *named, last = capfd.readouterr().err.strip().splitlines()
    assert last == "100 of 1000 pictures were broken and skipped"
    assert sorted(Path(line.split(": ")[1]).name for line in named if "broken picture" in line) == sorted(broken)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["images"], metrics["skipped_pictures"]) == (COUNT - len(broken), len(broken))


def test_every_kind_is_told_apart(folder: tuple[Path, set[str]]) -> None:
    root, broken = folder
    pictures = ImageFolder(str(root / "all"), str(root / "all"), image_size=32).evaluation_set()
    found = {}
    for index in range(len(pictures)):
        try:
            pictures[index]
        except BrokenImage as error:
            found[pictures.name(index)] = str(error).rpartition(": ")[2]
    assert found.keys() == broken
    assert {"the file is empty", "not a picture in a known format", "the file does not exist"} <= set(found.values())
    assert any(reason.startswith("too many pixels") for reason in found.values())
    assert len(some_images(pictures, 12)) > 8


def test_shards_of_it_leave_them_out_or_keep_them(folder: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, broken = folder
    written = write_shards(root / "all", tmp_path / "clean", megabytes=1, workers=0)
    assert (written.left_out.keys(), written.pictures) == (broken, COUNT - len(broken))
    assert len(list(Shards(str(tmp_path / "clean"), image_size=32, batch_size=20, workers=0).train_dataloader())) > 40
    kept = write_shards(root / "all", tmp_path / "dirty", broken="keep", workers=0)
    unreadable = ("No such file or directory", "Permission denied")
    assert kept.left_out == {name: reason for name, reason in written.left_out.items() if reason in unreadable}
    data = Shards(str(tmp_path / "dirty"), image_size=32, batch_size=20, workers=0)
    assert len(list(data.train_dataloader())) > 40
    assert data.skipped > 30  # of those that are not evaluated, too, or the same


def whole(folder: Path) -> dict[str, Image.Image]:
    """Pictures that are odd, and can be read."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 40, 3), dtype=np.uint8))
    picture.save(folder / "png named.jpg", format="PNG")
    picture.save(folder / "jpeg named.png", format="JPEG")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    Image.fromarray(np.full((36, 40), 40_000, dtype=np.uint16)).save(folder / "16 bits.png")
    picture.resize((1, 1)).save(folder / "1 pixel.png")
    picture.resize((1, 500)).save(folder / "thin.png")
    frames = [Image.new("RGB", (36, 40), colour) for colour in ("red", "lime")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return {path.name: picture for path in folder.iterdir()}


@pytest.mark.parametrize("crop", ["resized", "fast", "plain", "center"])
def test_what_is_odd_is_read(crop: str, tmp_path: Path) -> None:
    names = whole(tmp_path)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "0.png")
    folders = (str(tmp_path), str(tmp_path / "other"))
    settings: dict[str, Any] = {"image_size": 32, "batch_size": len(names), "workers": 0}
    data = ImageFolder(*folders, crop=crop, max_broken=0.0, **settings)
    (batch,) = list(data.train_dataloader())
    assert batch.shape == (len(names), 3, 32, 32)
    (tmp_path / "other" / "0.png").unlink()
    data = ImageFolder(*reversed(folders), **settings)
    (batch,) = list(data.val_dataloader())
    pictures = data.evaluation_set()
    images = {pictures.name(index): image for index, image in enumerate(batch)}
    assert images["animated.gif"][:, 9, 9].tolist() == [1, -1, -1], "the first frame"
    assert images["16 bits.png"].flatten()[0] == pytest.approx(40_000 / 65_535 * 2 - 1, abs=0.004)
    assert data.skipped == 0


REFUSED = {
    "30 000 x 30 000.png": "too many pixels to be a picture",
    "1 x 4 000 000.ppm": "too long and thin to be a picture: 1 x 4000000 pixels would become 64 x 256000000",
    "pipe.png": "cannot be read: a named pipe, a device or a socket is not read",
    "folder.png": "is a folder, not a picture",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_take_all_memory_or_time_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".ppm"):
        path.write_bytes(b"P6 1 4000000 255 " + bytes(12_000_000))
    elif name == "pipe.png":
        os.mkfifo(path)
    elif name == "folder.png":
        path.mkdir()
    else:
        path.write_bytes(png_header(30_000, 30_000) + b"\0\0\0\x10IDAT" + bytes(20))  # refused before a pixel is looked for
    with pytest.raises(BrokenImage) as caught:
        FileSet(tmp_path, [name], CenterCrop(64), "all")[0]
    assert str(caught.value).startswith(f"{path}: {REFUSED[name]}")


class Some(PictureSet):
    """Of `count` pictures those are broken for which `broken` says so."""

    split = "some"

    def __init__(self, count: int, broken: Callable[[int], bool]) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.broken(index):
            raise BrokenImage(f"{index}: broken")
        return torch.full((3, 32, 32), float(index))

    def name(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> int:
        return 1


def drawn_until_it_stops(pictures: Guarded, order: Iterable[int]) -> tuple[int, str]:
    for count, index in enumerate(order, 1):
        if isinstance(item := pictures[index], UserError):
            return count, str(item)
    return -1, ""


def test_training_stops_where_too_many_are_broken() -> None:
    order = np.random.default_rng(0).permutation(2000).tolist()
    third = Guarded(Some(2000, lambda index: index % 3 == 0), "replace", 0.2)
    count, message = drawn_until_it_stops(third, order)
    assert loading.ENOUGH <= count < loading.ENOUGH + 10
    broken = sum(index % 3 == 0 for index in order[:count])
    assert message.startswith(
        f"{broken} of the {count} pictures of some drawn so far cannot be read, more than data.max_broken 0.2: repair"
    )
    assert drawn_until_it_stops(Guarded(Some(2000, lambda index: index % 3 == 0), "replace", 0.4), order) == (-1, "")
    assert drawn_until_it_stops(Guarded(Some(2000, lambda index: index % 10 == 0), "replace", 0.2), order) == (-1, "")
    # one that is broken stops it where none may be, and a picture counts once however often it is drawn
    assert drawn_until_it_stops(Guarded(Some(2000, lambda index: index == 1999), "replace", 0.0), range(2000))[0] == 2000
    assert drawn_until_it_stops(Guarded(Some(2000, lambda index: index == 5), "replace", 0.2), [5] * 1000) == (-1, "")
    few = Guarded(Some(4, lambda index: index == 0), "replace", 0.2)
    assert drawn_until_it_stops(few, [0, 1, 2]) == (-1, "")
    assert drawn_until_it_stops(few, [3, 0])[0] == 2, "of so few all have been drawn"


def test_a_broken_folder_is_not_the_whole() -> None:
    """A tenth is broken, side by side: one draw goes through them all, and tells of one."""
    order = np.random.default_rng(0).permutation(2000).tolist()
    pictures = Guarded(Some(2000, lambda index: index < 200), "replace", 0.2)
    assert drawn_until_it_stops(pictures, order) == (-1, "")
    assert pictures.broken.sum() == 200


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_of_broken_pictures_ends_in_one_line(tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "clean").mkdir()
    for index in range(20):
        path = tmp_path / "pictures" / f"{index:02d}.png"
        Image.new("RGB", (40, 40), (index, 0, 0)).save(path)
        if index % 2:
            path.write_bytes(b"broken")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "clean" / "0.png")
    configs = ("base", "backbone/vit_small", "data/folder", "scale/smoke", "machine/cpu")
    call = ["fit", *(text for name in configs for text in ("--config", str(CONFIGS / f"{name}.yaml")))]
    call += ["--trainer.enable_progress_bar=false", f"--runs={tmp_path}", "--name=run"]
    call += ["--trainer.max_steps=40", "--trainer.limit_val_batches=0"]
    call += ["--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"]
    call += [f"--data.init_args.root={tmp_path / 'pictures'}", f"--data.init_args.workers={workers}", "--data.init_args.batch_size=2"]
    call += [f"--data.init_args.validation_root={tmp_path / 'clean'}", "--data.init_args.image_size=32"]
    assert main(call) == 2
    *_, line = capfd.readouterr().err.strip().splitlines()
    said = "of the 20 pictures of training folder drawn so far cannot be read, more than data.max_broken 0.2: repair"
    assert line.startswith("error: ") and said in line
    lines = (tmp_path / "run" / "broken_pictures.txt").read_text().splitlines()
    assert len(lines) == 10 and all(line.startswith("training folder: ") for line in lines)

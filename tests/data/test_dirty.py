"""A thousand pictures of which a hundred are broken, in all the ways that downloads and disks have."""

import json
import logging
import os
import struct
import zlib
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
from PIL import Image
from small import small_tokenizer

from gq_lightning.callbacks import BrokenPictures
from gq_lightning.cli import main
from gq_lightning.data import BrokenImage, ImageFolder
from gq_lightning.evaluation import some_images

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
    trainer.fit(small_tokenizer("vit"), data)
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

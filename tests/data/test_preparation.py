"""The published preparation of pictures, by torchvision's own transforms on Pillow's pictures: every way into the package does the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from gq_lightning.cli.main import main
from gq_lightning.data import ImageFolder, ImageNet, Shards, center_crop, resize_shorter
from gq_lightning.data.sets import Cut, TrainingCrop
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.tokens.codec import encode_pictures

SIZES = [(640, 427), (427, 640), (500, 333), (481, 321), (257, 511), (255, 1021), (31, 77), (77, 31), (101, 101), (64, 64), (33, 32)]
SIZE = 64  # larger than some of these and smaller than others


def picture(width: int, height: int) -> Image.Image:
    """Noise over a slope: what a filter, a shift or another crop changes shows."""
    noise = np.random.default_rng(width * height).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


def published(picture: Image.Image, size: int = SIZE) -> Tensor:
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    return transforms.Compose(steps)(picture)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [8, 33, 64, 128, 256])
def test_pixels_are_those_of_torchvision(width: int, height: int, size: int) -> None:
    given = picture(width, height)
    resized = resize_shorter(given, size)
    assert np.array_equal(np.asarray(resized), np.asarray(transforms.Resize(size)(given)))
    assert min(resized.size) == size
    assert max(resized.size) == int(size * max(given.size) / min(given.size))
    square = np.asarray(center_crop(resized, size))
    assert np.array_equal(square, np.asarray(transforms.CenterCrop(size)(transforms.Resize(size)(given))))


def test_it_is_pillows_bilinear_filter_and_truncates() -> None:
    given = picture(640, 427)  # 256 * 640 / 427 = 383.7
    expected = given.resize((383, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(resize_shorter(given, 256)), np.asarray(expected))


class Recorder:
    """A tokenizer that keeps what it is to encode."""

    downsampling, fixed_image_size, codebook_size, tokens_per_position = 8, None, 4, 1
    fingerprint = tokens_fingerprint = "a" * 64

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def encode(self, images: Tensor, *options: object) -> Tensor:
        self.images += images
        return torch.zeros(len(images), images.shape[2] // 8, images.shape[3] // 8, 1, dtype=torch.int64)

    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor:
        raise NotImplementedError


def test_every_way_in_gives_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = tmp_path / "val", {}
    folder.mkdir()
    for width, height in SIZES:
        written[f"{width}x{height}.png"] = picture(width, height)
        written[f"{width}x{height}.png"].save(folder / f"{width}x{height}.png")
    other = tmp_path / "other"
    other.mkdir()
    picture(40, 50).save(other / "other.png")
    write_shards(folder, tmp_path, split="val", workers=0)
    sets: dict[str, Any] = {
        "folder": ImageFolder(str(folder), str(folder), image_size=SIZE).evaluation_set(),
        "imagenet": ImageNet(str(tmp_path), image_size=SIZE).evaluation_set(),
        "shards": Shards(str(tmp_path), training="val-*.tar", validation="val-*.tar", image_size=SIZE).evaluation_set(),
        "center": ImageFolder(str(folder), str(other), image_size=SIZE, crop="center").training_set(),
    }
    seen = {way: {pictures.name(index): pictures[index] for index in range(len(pictures))} for way, pictures in sets.items()}

    recorder = Recorder()
    encode_pictures(recorder, [folder], tmp_path / "tokens", "resize", SIZE, progress=False)
    seen["encode"] = dict(zip(sorted(written), recorder.images, strict=True))

    evaluated: list[Tensor] = []

    def evaluate(tokenizer: object, batches: Any, **options: object) -> tuple[dict[str, float], dict[str, Any]]:
        evaluated.extend(image for batch in batches for image in batch)
        return {"images": len(evaluated)}, {}

    monkeypatch.setattr("gq_lightning.evaluation.evaluate.evaluate", evaluate)
    monkeypatch.setattr("gq_lightning.cli.loading.load_tokenizer", lambda *arguments: Recorder())
    monkeypatch.setattr("gq_lightning.evaluation.report.metrics_table", lambda values, title: title)
    call = ["evaluate", "--tokenizer=none", f"--data={folder}", f"--size={SIZE}", "--workers=0", f"--out={tmp_path / 'metrics.json'}"]
    assert main(call) == 0
    seen["evaluate"] = dict(zip(sorted(written), evaluated, strict=True))
    protocol = json.loads((tmp_path / "metrics.json").read_text())["protocol"]["data"]
    assert protocol["interpolation"] == "bilinear, antialiased (Pillow), longer side truncated"

    for way, images in seen.items():
        assert images.keys() == written.keys(), way
        for name, given in written.items():
            assert torch.equal(images[name], seen["folder"][name]), (way, name)
            torch.testing.assert_close(images[name], published(given), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cut", "most"), [("resized", 0), ("fast", 2)])
def test_training_windows_are_resized_by_the_same_filter(cut: Cut, most: int) -> None:
    """With all of the area there is one window of a square picture, the whole."""
    given = picture(101, 101)
    expected = torch.from_numpy(np.array(given.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1).int()
    crop = TrainingCrop(32, cut, (1.0, 1.0))
    for _ in range(10):
        pixels = crop(given).int()
        nearest = min((pixels - expected).abs().max(), (pixels.flip(2) - expected).abs().max())
        assert nearest <= most


def test_the_published_training_crop_is_the_centre_and_never_flipped() -> None:
    given = picture(77, 51)
    crop = TrainingCrop(32, "center", (0.8, 1.0))
    expected = torch.from_numpy(np.array(transforms.CenterCrop(32)(transforms.Resize(32)(given)))).permute(2, 0, 1)
    before = torch.get_rng_state()
    assert all(torch.equal(crop(given), expected) for _ in range(20))
    assert torch.equal(torch.get_rng_state(), before)
    assert (crop.resize, crop.crop) == ("shorter side to 32", "centre 32 x 32")


def test_native_crops_are_never_enlarged_and_cover_every_octave() -> None:
    # a ramp that rises by one a pixel: the steps of a crop say how far it was shrunk
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    crop = TrainingCrop(32, "native")
    torch.manual_seed(0)
    steps = torch.stack([crop(ramp)[0, 16].float().diff()[8:-8].mean().abs() for _ in range(400)])
    assert steps.min() >= 0.95
    assert steps.max() <= 8.3
    octaves = [((steps >= low) & (steps < 2 * low)).float().mean().item() for low in (1, 2, 4)]
    assert all(0.25 < share < 0.42 for share in octaves)


@pytest.mark.parametrize("size", [(32, 32), (20, 40), (5, 7)])
def test_a_native_crop_of_a_small_picture_is_all_of_its_shorter_side(size: tuple[int, int]) -> None:
    assert TrainingCrop(32, "native")(Image.new("RGB", size)).shape == (3, 32, 32)

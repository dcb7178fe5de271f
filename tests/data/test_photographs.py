import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import Photographs, photographs
from gq_lightning.errors import UserError


@pytest.fixture(scope="module")
def data() -> Photographs:
    return Photographs(crops_per_epoch=1024, augment=False)


@pytest.fixture(scope="module")
def training(data: Photographs) -> photographs.RandomCrops:
    pictures = data.training_set()
    assert isinstance(pictures, photographs.RandomCrops)
    return pictures


def test_the_grid_is_64_slices_of_three_photographs(data: Photographs) -> None:
    pictures, index = data.evaluation_set(), 0
    for name, (package, folder) in photographs.HELD_OUT.items():
        picture = Image.open(Path(__import__(package).__path__[0], folder, name)).convert("RGB")
        width, height = picture.size
        pixels = np.asarray(picture.resize((int(width * 256 / height), 256), Image.Resampling.BILINEAR))
        for row in range(4):
            for column in range(pixels.shape[1] // 64):
                square = pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
                expected = torch.tensor(square).permute(2, 0, 1).float() / 127.5 - 1
                assert torch.equal(pictures[index], expected)
                assert pictures.name(index) == f"{name}/{row}-{column}"
                index += 1
    assert len(pictures) == index == 64


def test_protocol(data: Photographs) -> None:
    assert data.protocol() == Photographs().protocol()
    assert data.protocol()["images"] == 64 and data.protocol()["resize"] == "shorter side to 256"
    assert Photographs(image_size=128).protocol()["fingerprint"] != data.protocol()["fingerprint"]
    large = Photographs(image_size=300)
    assert large.protocol()["images"] == 3 and large.protocol()["resize"] == "shorter side to 300"


def test_held_out_photographs_are_not_trained_on() -> None:
    assert len(photographs.TRAINING) == 18 and not set(photographs.TRAINING) & set(photographs.HELD_OUT)


def test_training_crops(training: photographs.RandomCrops) -> None:
    assert len(training) == 1024
    assert all(min(photograph.shape[1:]) >= 64 for photograph in training.photographs)
    crops = torch.stack([training[0] for _ in range(200)])
    assert crops.shape == (200, 3, 64, 64) and crops.dtype == torch.float32 and crops.min() >= -1 and crops.max() <= 1
    assert len({crop.numpy().tobytes() for crop in crops}) > 190


def test_every_crop_can_be_drawn() -> None:
    pictures = photographs.RandomCrops(64, 1)
    rows, columns = torch.meshgrid(torch.arange(66), torch.arange(67), indexing="ij")
    pictures.photographs = [torch.stack([rows, columns, torch.full_like(rows, which)]).byte() for which in (0, 1)]
    seen = set()
    for _ in range(1000):
        row, column, which = ((pictures[0] + 1) * 127.5).round().int()
        flipped = bool(column[0, 0] > column[0, 1])
        top, left = int(row.min()), int(column.min())
        across = torch.arange(left, left + 64, dtype=torch.int32).expand(64, 64)
        assert torch.equal(row, torch.arange(top, top + 64, dtype=torch.int32)[:, None].expand(64, 64))
        assert torch.equal(column, across.flip(1) if flipped else across) and which.min() == which.max()
        seen.add((int(which[0, 0]), top, left, flipped))
    assert len(seen) == 2 * 3 * 4 * 2  # missing one has a chance of 4e-8


def test_torch_seed_decides(training: photographs.RandomCrops) -> None:
    torch.manual_seed(3)
    first = training[0]
    assert not torch.equal(training[0], first)
    torch.manual_seed(3)
    assert torch.equal(training[0], first)


def test_crops_are_cut_fast(training: photographs.RandomCrops) -> None:
    start = time.process_time()
    for index in range(1000):
        training[index]
    assert time.process_time() - start < 0.5


def test_large_images() -> None:
    assert photographs.RandomCrops(512, 1)[0].shape == (3, 512, 512)
    with pytest.raises(UserError, match=r"data.image_size 2000 is larger than all photographs"):
        photographs.RandomCrops(2000, 1)
    with pytest.raises(UserError, match=r"data.crops_per_epoch"):
        Photographs(crops_per_epoch=0)


def test_a_photograph_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(photographs.HELD_OUT, "gone.png", ("skimage", "data"))
    with pytest.raises(UserError, match=r"installed scikit-image lacks gone\.png"):
        Photographs().evaluation_set()
    monkeypatch.setitem(photographs.HELD_OUT, "gone.png", ("no_such_package", "data"))
    with pytest.raises(UserError, match=r"lacks gone\.png"):
        Photographs().evaluation_set()

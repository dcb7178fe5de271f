import io
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import CIFAR10, Imagenette
from gq_lightning.errors import UserError


class SmallCIFAR:
    def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
        self.data = np.random.default_rng(train).integers(0, 256, (6 if train else 3, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), 0


def test_cifar_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10", SmallCIFAR)
    data = CIFAR10(str(tmp_path), batch_size=2, workers=0)
    data.prepare_data()
    images = torch.cat(list(data.test_dataloader()))
    assert torch.equal(images, torch.from_numpy(SmallCIFAR(tmp_path, train=False).data).permute(0, 3, 1, 2) / 127.5 - 1)
    expected = torch.from_numpy(SmallCIFAR(tmp_path).data).permute(0, 3, 1, 2) / 127.5 - 1
    for image in torch.cat(list(data.train_dataloader())):
        assert any(torch.equal(image, way) for one in expected for way in (one, one.flip(2)))
    protocol = data.protocol()
    assert protocol["images"] == 3 and protocol["split"] == "test" and protocol["image_size"] == 32
    assert CIFAR10(str(tmp_path), image_size=48).evaluation_set()[0].shape == (3, 48, 48)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> io.BytesIO:
        raise URLError("name resolution failed")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for data, name in ((CIFAR10(str(tmp_path / "c")), "CIFAR-10"), (Imagenette(str(tmp_path / "i")), "Imagenette")):
        with pytest.raises(UserError, match=f"cannot download {name} to .*check the network") as caught:
            data.prepare_data()
        assert "\n" not in str(caught.value)


def test_not_downloaded_yet(tmp_path: Path) -> None:
    for data in (CIFAR10(str(tmp_path)), Imagenette(str(tmp_path))):
        with pytest.raises(UserError, match="call prepare_data"):
            data.train_dataloader()


@pytest.mark.parametrize(("variant", "folder"), [("160px", "imagenette2-160"), ("320px", "imagenette2-320"), ("full", "imagenette2")])
def test_imagenette_in_place_is_not_downloaded(tmp_path: Path, variant: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    for split in ("train", "val"):
        (tmp_path / folder / split / "n01440764").mkdir(parents=True)
        Image.new("RGB", (20, 16), "red").save(tmp_path / folder / split / "n01440764" / f"{split}.JPEG")
    data = Imagenette(str(tmp_path), variant=variant, image_size=16, batch_size=1, workers=0)  # type: ignore[arg-type]
    data.prepare_data()
    assert data.training_set().name(0) == "n01440764/train.JPEG" and data.evaluation_set().name(0) == "n01440764/val.JPEG"
    assert next(iter(data.train_dataloader())).shape == (1, 3, 16, 16)

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from gq_lightning.data import BrokenImage, ImageFolder, ImageNet, Photographs
from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.sets import PictureSet
from gq_lightning.errors import UserError


def fill(folder: Path, count: int, broken: tuple[int, ...] = ()) -> None:
    """Pictures of one grey level each, twice their index, in two class folders."""
    for index in range(count):
        path = folder / f"class{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index in broken:
            path.write_bytes(b"broken")
        else:
            Image.fromarray(np.full((20, 24, 3), 2 * index, dtype=np.uint8)).save(path)


@pytest.fixture
def imagenet(tmp_path: Path) -> Callable[..., ImageNet]:
    def make(
        train: int = 12, val: int = 11, broken_train: tuple[int, ...] = (), broken_val: tuple[int, ...] = (), **settings: object
    ) -> ImageNet:
        fill(tmp_path / "train", train, broken_train)
        fill(tmp_path / "val", val, broken_val)
        return ImageNet(str(tmp_path), **{"image_size": 16, "batch_size": 4, "workers": 0} | settings)  # type: ignore[arg-type]

    return make


def levels(batches: object) -> list[int]:
    """Index of the picture that each image of the batches is."""
    images = torch.cat(list(batches))  # type: ignore[call-overload]
    assert images.shape[1:] == (3, 16, 16)
    return ((images.flatten(1)[:, 0] + 1) * 127.5 / 2).round().int().tolist()


def test_batches(imagenet: Callable[..., ImageNet]) -> None:
    data = imagenet(train=14, val=11, evaluation_batch_size=5)
    training = list(data.train_dataloader())
    assert [len(batch) for batch in training] == [4, 4, 4]
    assert len(set(levels(training))) == 12
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [len(batch) for batch in loader] == [5, 5, 1]
        order = levels(loader)
        assert sorted(order) == list(range(11)) and order == levels(loader)
        assert [data.evaluation_set().name(i) for i in range(11)] == [f"class{i % 2}/{i:03d}.png" for i in order]
    assert data.skipped == 0


def test_training_order_follows_the_seed(imagenet: Callable[..., ImageNet]) -> None:
    torch.manual_seed(1)
    loader = imagenet().train_dataloader()
    first = levels(loader)
    assert levels(loader) != first, "another epoch"
    torch.manual_seed(1)
    assert levels(imagenet().train_dataloader()) == first
    torch.manual_seed(2)
    assert levels(imagenet().train_dataloader()) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_training_pictures_are_replaced_named_once_and_counted(
    imagenet: Callable[..., ImageNet], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = imagenet(broken_train=(3, 4, 5), workers=workers, max_broken=0.25)
    loader = data.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [4, 4, 4]
        assert set(levels(batches)) == set(range(12)) - {3, 4, 5}
    assert data.skipped == 3
    if workers == 0:  # the workers' logs are not the main process's
        records = [record for record in caplog.records if record.name == "gq_lightning.data"]
        assert sorted(record.getMessage().split("/")[-1].split(":")[0] for record in records) == ["003.png", "004.png", "005.png"]
        assert {record.levelno for record in records} == {logging.WARNING}


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_a_broken_picture(imagenet: Callable[..., ImageNet], workers: int) -> None:
    data = imagenet(broken_val=(6,), workers=workers)
    with pytest.raises(BrokenImage, match=r"^[^\n]*006\.png: not a picture in a known format$"):  # one line, without the worker's traceback
        list(data.val_dataloader())
    assert data.skipped == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_pictures_out_where_allowed(imagenet: Callable[..., ImageNet], workers: int) -> None:
    data = imagenet(broken_val=(0, 2, 4, 6, 7), workers=workers, skip_broken=True)  # the first batch is class0: empty
    batches = list(data.val_dataloader())
    assert sorted(levels(batches)) == [1, 3, 5, 8, 9, 10] and all(len(batch) for batch in batches)
    assert sorted(levels(data.test_dataloader())) == [1, 3, 5, 8, 9, 10]
    assert data.skipped == 5


def test_what_was_first_read_in_inference_mode(imagenet: Callable[..., ImageNet]) -> None:
    data = imagenet(broken_val=(0, 2), skip_broken=True)
    with torch.inference_mode():
        loader = data.val_dataloader()
    assert len(levels(loader)) == 9
    assert data.skipped == 2


def test_nothing_readable(imagenet: Callable[..., ImageNet]) -> None:
    data = imagenet(train=4, val=4, broken_train=tuple(range(4)), broken_val=tuple(range(4)), skip_broken=True)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(UserError, match="none of the 4 pictures"):
            list(loader)


def become_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: world_size)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_evaluation_set(imagenet: Callable[..., ImageNet], monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    data, seen = imagenet(val=11), []
    for rank in range(world_size):
        become_rank(monkeypatch, rank, world_size)
        seen += levels(data.val_dataloader())
    assert sorted(seen) == list(range(11))


def test_too_few_pictures(imagenet: Callable[..., ImageNet], monkeypatch: pytest.MonkeyPatch) -> None:
    data = imagenet(train=7, val=2)
    assert len(data.train_dataloader()) == 1
    become_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="7 pictures, too few for one batch of 4 on each of 3 devices"):
        data.train_dataloader()
    with pytest.raises(UserError, match="2 pictures for 3 devices"):
        data.val_dataloader()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"too few for one batch of 8: lower data.batch_size"):
        imagenet(train=7, batch_size=8).train_dataloader()


@pytest.mark.parametrize("name", ["image_size", "batch_size", "evaluation_batch_size"])
def test_numbers_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"data.{name} 0"):
        Photographs(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data.workers -1"):
        Photographs(workers=-1)


def test_protocol_names_no_machine(imagenet: Callable[..., ImageNet], tmp_path: Path) -> None:
    data = imagenet()
    protocol = data.protocol()
    assert str(tmp_path) not in str(protocol)
    assert protocol["data"] == "ImageNet" and protocol["split"] == "val" and protocol["images"] == 11
    assert protocol["crop"] == "centre 16 x 16" and "bilinear" in protocol["interpolation"] and protocol["value_range"] == [-1, 1]
    moved = tmp_path / "moved"
    fill(moved, 11)
    same = ImageFolder(str(moved), validation_root=str(moved)).protocol()
    assert same["fingerprint"] == protocol["fingerprint"]
    (moved / "class0" / "000.png").rename(moved / "class0" / "other.png")
    assert ImageFolder(str(moved), validation_root=str(moved)).protocol()["fingerprint"] != protocol["fingerprint"]


def test_datasets_survive_pickling(imagenet: Callable[..., ImageNet]) -> None:
    data = imagenet()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        guarded: Any = loader.dataset
        copy = pickle.loads(pickle.dumps(guarded))
        assert copy.pictures.name(0) == guarded.pictures.name(0) and torch.equal(copy[0], guarded[0])
    assert pickle.loads(pickle.dumps(Photographs().evaluation_set())).name(0) == "chelsea.png/0-0"


class Collector(LightningModule):
    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_lightning_predicts_what_can_be_read(imagenet: Callable[..., ImageNet]) -> None:
    data = imagenet(broken_val=(0, 2, 4, 6), workers=1, skip_broken=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert sorted(levels(trainer.predict(Collector(), data))) == [1, 3, 5, 7, 8, 9, 10]


SIGNALS = """
import os, sys
for pid in sys.argv[1:]:
    for number in (10, 12, 15):
        os.kill(int(pid), number)
"""


def test_workers_heed_their_own_process_alone(imagenet: Callable[..., ImageNet]) -> None:
    """SIGTERM, SIGUSR1 and SIGUSR2 from elsewhere, as to a whole process group, are the training's; its own SIGTERM ends a worker."""
    loader = imagenet(train=40, workers=1).train_dataloader()
    iterator = iter(loader)
    batches = [next(iterator)]
    (worker,) = loader._iterator._workers  # type: ignore[union-attr]
    assert (int(signal.SIGUSR1), int(signal.SIGUSR2), int(signal.SIGTERM)) == (10, 12, 15)
    subprocess.run([sys.executable, "-c", SIGNALS, str(worker.pid)], check=True)
    assert len(batches + list(iterator)) == 10
    worker.join(0.5)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


def test_pixels_travel_to_the_trainer_in_bytes(imagenet: Callable[..., ImageNet]) -> None:
    """The same images with and without a trainer, to the bit; with one, the hook converts them after the transfer."""
    alone, attached = imagenet(), imagenet()
    attached.trainer = Mock()
    for here, there in zip(alone.test_dataloader(), attached.test_dataloader(), strict=True):
        assert there.dtype == torch.uint8
        assert torch.equal(attached.on_after_batch_transfer(there, 0), here)
    assert here.dtype == torch.float32


def test_a_set_of_floats_is_served_as_it_is() -> None:
    class Floats(PictureSet):
        split = resize = crop = "none"

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((3, 8, 8), index / 4)

        def name(self, index: int) -> str:
            return str(index)

        def size(self, index: int) -> int:
            return 1

    class Module(ImageDataModule):
        def training_set(self) -> PictureSet:
            return Floats()

        evaluation_set = training_set

    module = Module(image_size=8, batch_size=3, workers=0)
    module.trainer = Mock()
    (batch,) = module.test_dataloader()
    assert torch.equal(module.on_after_batch_transfer(batch, 0)[:, 0, 0, 0], torch.tensor([0, 0.25, 0.5]))

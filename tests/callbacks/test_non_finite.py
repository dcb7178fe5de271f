import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small import small_training

from gq_lightning import UserError
from gq_lightning.callbacks import CheckpointFiles, LastCheckpoint, NonFinite
from gq_lightning.data import ImageFolder

BATCH = 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 6), ("val", 1)):
        (root / split).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(index + 100 * (split == "val")).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{index}.png")
    return root


class Spoil(pl.Callback):
    """Makes the loss or the gradient of one batch, by its number from the beginning, not finite."""

    def __init__(self, batch: int, what: str) -> None:
        self.batch, self.what = batch, what

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx != self.batch:
            return
        if self.what == "loss":
            batch[1, 0, 3, 4] = torch.nan
        else:
            handle = pl_module.tokenizer.backbone.last_layer.register_hook(lambda gradient: (handle.remove(), gradient * torch.inf)[1])


def fit(folder: Path, pictures: Path, spoil: Spoil | None, validate: bool = False, **arguments: Any) -> pl.Trainer:
    training = small_training("vit", learning_rate=1e-3, **arguments)
    torch.manual_seed(3)
    data = ImageFolder(str(pictures / "train"), str(pictures / "val"), image_size=32, batch_size=BATCH, workers=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8,
        limit_val_batches=1 if validate else 0,
        num_sanity_val_steps=0,
        val_check_interval=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[NonFinite(), LastCheckpoint(1), *([spoil] if spoil else [])],
        plugins=[CheckpointFiles()],
    )
    trainer.fit(training, data)
    return trainer


@pytest.mark.parametrize(("what", "says"), [("loss", "the loss is nan"), ("gradient", "the gradient is not finite")])
@pytest.mark.parametrize("batch", [4, 7])
def test_the_batch_is_named_and_kept(what: str, says: str, batch: int, tmp_path: Path, pictures: Path) -> None:
    """In the middle of the second of three epochs, and at the last step of all."""
    with pytest.raises(UserError, match=says) as error:
        fit(tmp_path, pictures, Spoil(batch, what))
    epoch, index = divmod(batch, 3)
    assert f"batch {index} of epoch {epoch}" in str(error.value)
    assert "--ckpt_path last" in str(error.value) and "\n" not in str(error.value)
    kept = tmp_path / f"non_finite/epoch{epoch}-batch{index}-rank0.safetensors"
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.with_suffix(".png").name, kept.name]
    with safe_open(kept, "pt") as file:
        images, told = file.get_tensor("images"), json.loads(file.metadata()["told"])
    assert images.shape == (BATCH, 3, 32, 32)
    assert (told["epoch"], told["batch"]) == (epoch, index)
    assert images.isnan().any() == (what == "loss")
    # the names are those of its pictures: crops of nearly the whole picture resemble no other
    assert set(told["names"]) <= {f"{number}.png" for number in range(6)}
    assert len(set(told["names"])) == BATCH
    for name in told["names"]:
        assert name in str(error.value)
    # what the last checkpoint holds is from before
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == batch
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_batch_names_are_those_of_the_loader(pictures: Path) -> None:
    torch.manual_seed(3)
    data = ImageFolder(str(pictures / "train"), str(pictures / "val"), image_size=32, batch_size=BATCH, workers=0, crop="plain")
    loader = data.train_dataloader()
    pictures_by_name = {data._training.pictures.name(index): data._training.pictures[index] for index in range(6)}
    for epoch in range(2):
        for index, batch in enumerate(loader):
            for name, image in zip(data.batch_names(epoch, index), batch, strict=True):
                square = pictures_by_name[name]
                assert torch.equal(image, square) or torch.equal(image, square.flip(-1))


def test_accumulation_stops_at_a_whole_step(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="batch 0 of epoch 1"):
        fit(tmp_path, pictures, Spoil(3, "loss"), accumulate=2)
    # an epoch of three batches has two steps
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_before_a_validation(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match="batch 1 of epoch 0"):
        fit(tmp_path, pictures, Spoil(1, "loss"), validate=True)


def test_a_finite_training_is_left_alone(tmp_path: Path, pictures: Path) -> None:
    assert fit(tmp_path, pictures, None).global_step == 8
    assert not (tmp_path / "non_finite").exists()

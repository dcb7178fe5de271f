"""A training that was interrupted and resumed is the uninterrupted one, to the bit."""

import random
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from small import small_tokenizer

from gq_lightning.adversary import Adversary
from gq_lightning.callbacks import TDC, CheckpointFiles, ExactResume, LastCheckpoint
from gq_lightning.data import ImageFolder
from gq_lightning.discriminator import PatchDiscriminator
from killed import difference, read, write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 of them to train on: five batches of four, and two pictures that an epoch leaves out."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Also logs random numbers that anybody might draw."""

    def __init__(self, batch: int, ask: int) -> None:
        self.batch, self.ask = batch, ask

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        pl_module.log_dict({"torch": torch.rand(()), "numpy": float(np.random.rand()), "python": random.random()})
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Killed
        trainer.should_stop |= trainer.global_step + 1 == self.ask


class Kept(CheckpointFiles):
    """Keeps a copy of each last checkpoint, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        if Path(path).name == "last.ckpt":
            self.paths.append(Path(path).with_name(f"copy-{len(self.paths)}.ckpt"))
            shutil.copy(path, self.paths[-1])


class Notes(Logger):
    """What was logged at which step; as in TensorBoard, what is logged again takes the place of what was there."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = defaultdict(dict)

    name = version = "notes"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values[step or 0] |= metrics


def fit(
    folder: Path,
    pictures: Path,
    *,
    notes: Notes,
    kill: int = -1,
    resume: Path | None = None,
    workers: int = 0,
    adversary: bool = False,
    accumulate: int = 1,
    every: int = 1,
    schedule: str = "cosine",
    ask: int = -1,
    **settings: Any,
) -> tuple[Kept, dict[str, torch.Tensor]]:
    """Trains with all that has a state: TDC, averaged weights, the best and the last checkpoint. The weights are the averages."""
    extra = {"adversary": Adversary(PatchDiscriminator(8, layers=1), start=3, warmup=2)} if adversary else {}
    length = {"max_steps": 12} if not {"max_epochs", "max_steps"} & settings.keys() else {}
    tokenizer = small_tokenizer("vit", learning_rate=1e-3, schedule=schedule, warmup_steps=3, accumulate=accumulate, **extra)
    torch.manual_seed(5)
    data = ImageFolder(
        str(pictures / "train"), str(pictures / "val"), crop="resized", scale=(0.3, 1), image_size=32, batch_size=4, workers=workers
    )
    callbacks = [
        ExactResume(),
        EMAWeightAveraging(decay=0.8, use_buffers=False),
        TDC(),
        Kill(kill, ask),
        ModelCheckpoint(
            folder,
            "best",
            "val/psnr",
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
        ),
        LastCheckpoint(every),
    ]
    files = Kept()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=notes,
        callbacks=callbacks,
        plugins=[files],
        default_root_dir=folder,
        **quiet,
        **length,
        **settings,
    )
    try:
        trainer.fit(tokenizer, data, ckpt_path=resume)
        assert kill < 0
    except Killed:
        pass
    return files, tokenizer.state_dict()


def assert_same(first: Any, second: Any, where: str = "") -> None:
    assert (found := difference(first, second, where)) is None, found


VALIDATE_BY_STEP = {"val_check_interval": 3, "check_val_every_n_epoch": None}
SETTINGS = {
    "validation by step": VALIDATE_BY_STEP,
    "validation by epoch": {},
    "length in epochs": {"max_epochs": 3},
    "no validation": {"limit_val_batches": 0},
    "limited epochs": {"limit_train_batches": 3, **VALIDATE_BY_STEP},
    "accumulation": {"accumulate": 2, **VALIDATE_BY_STEP},
    "adversary": {"adversary": True, **VALIDATE_BY_STEP},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_at_a_checkpoint(name: str, some: bool, tmp_path: Path, pictures: Path) -> None:
    """Everything that a checkpoint holds is the same at the end: weights, averages, multipliers, optimizers, schedulers, progress, best."""
    settings = SETTINGS[name]
    whole, weights = fit(tmp_path, pictures, notes=(logged := Notes()), **settings)
    final = read(tmp_path / "last.ckpt")
    assert len(whole.paths) > 8
    # in an epoch, at the end of an epoch, at the end of all
    for path in [whole.paths[index] for index in (1, 4, -1)] if some else whole.paths:
        batches = read(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        _, resumed = fit(tmp_path, pictures, notes=(notes := Notes()), resume=path, every=1000, **settings)
        assert_same(resumed, weights, path.name)
        assert_same(read(tmp_path / "last.ckpt"), final, path.name)
        assert list(notes.values) == [step for step in logged.values if step >= batches], path.name
        # under accumulation Lightning logs a value of the batch before, where this batch has none
        for step, values in notes.values.items():
            assert_same(values, {key: logged.values[step][key] for key in values}, f"{path.name}, logged at {step}")


# without workers, which torch may find dead while the exception unwinds; the runs killed below have some
@pytest.mark.parametrize("name", ["validation by step", "length in epochs"])
def test_interrupted_again_and_again(name: str, tmp_path: Path, pictures: Path) -> None:
    settings = SETTINGS[name]
    _, weights = fit(tmp_path, pictures, notes=(logged := Notes()), **settings)
    final = read(tmp_path / "last.ckpt")
    notes, resume = Notes(), None
    for kill in (3, 4, 5, 7, 10, -1):
        _, resumed = fit(tmp_path, pictures, notes=notes, kill=kill, resume=resume, **settings)
        resume = tmp_path / "last.ckpt"
    assert_same(resumed, weights)
    assert_same(read(tmp_path / "last.ckpt"), final)
    assert_same(dict(notes.values), dict(logged.values))


def test_a_finished_run_goes_on(tmp_path: Path, pictures: Path) -> None:
    """Stopped at its last step in the middle of an epoch, or asked to stop, a training can be made longer."""
    settings = {**VALIDATE_BY_STEP, "schedule": "constant"}
    _, weights = fit(tmp_path, pictures, notes=(logged := Notes()), **settings)
    for stop in ({"max_steps": 7}, {"ask": 7}):
        notes = Notes()
        fit(tmp_path, pictures, notes=notes, every=1000, **settings, **stop)
        _, resumed = fit(tmp_path, pictures, notes=notes, resume=tmp_path / "last.ckpt", **settings)
        assert_same(resumed, weights)
        assert logged.values.items() >= {step: notes.values[step] for step in logged.values if step not in (6, 7)}.items()


def test_ranks_and_batches_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, drawn = small_tokenizer("vit"), []
    for epoch, batch, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        trainer = SimpleNamespace(datamodule=SimpleNamespace(seed=3), current_epoch=epoch, global_rank=rank)
        ExactResume().on_train_batch_start(trainer, tokenizer, None, batch)  # type: ignore[arg-type]
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[4]
    for numbers in zip(*drawn[:4], strict=True):
        assert len(set(numbers)) == 4

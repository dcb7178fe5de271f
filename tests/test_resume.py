"""A training that was interrupted and resumed is the uninterrupted one, to the bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from small import CONFIGS, small_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gq_lightning.adversary import Adversary
from gq_lightning.callbacks import TDC, CheckpointFiles, ExactResume, LastCheckpoint
from gq_lightning.data import ImageFolder
from gq_lightning.discriminator import PatchDiscriminator


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 of them to train on: five batches of four, and two pictures that an epoch leaves out."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 22), ("val", 3)):
        (root / split).mkdir()
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 64)).save(root / split / f"{index}.png")
    return root


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


def read(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    # how many validation batches there have been in the epoch: Lightning counts, but does not use it
    checkpoint["loops"] = {"fit_loop": {key: value for key, value in checkpoint["loops"]["fit_loop"].items() if "val_loop" not in key}}
    for state in checkpoint["callbacks"].values():
        state.pop("current_score", None)  # of the last validation; the best is what counts, and Lightning does not restore this one
    return checkpoint


def assert_same(first: Any, second: Any, where: str = "") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, Sequence) and not isinstance(first, str):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert first == second, where


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


def arguments(pictures: Path, runs: Path, name: str, ranks: int) -> list[str]:
    configs = ("base.yaml", "backbone/vit_small.yaml", "data/folder.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    return [
        *("-m", "gq_lightning", "fit"),
        *(text for file in configs for text in ("--config", str(CONFIGS / file))),
        *(
            f"--data.init_args.{key}"
            for key in (f"root={pictures}/train", f"validation_root={pictures}/val", f"batch_size={4 // ranks}", "workers=2")
        ),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1", "--model.schedule=cosine"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--trainer.callbacks=gq_lightning.callbacks.TDC", "--trainer.callbacks+=gq_lightning.callbacks.GaussianQuant"),
        *("--export.rfid=false", "--trainer.enable_progress_bar=false", "--trainer.max_steps=24", "--trainer.val_check_interval=7"),
        *("--last.every_n_train_steps=3", "--ema_decay=0.9", f"--runs={runs}", f"--name={name}", "--threads=1", "--ckpt_path=last"),
        *([] if ranks == 1 else [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]),
    ]


def run_and_kill(call: list[str], last: Path, moment: float, **settings: Any) -> bool:
    """Whether the run has ended by itself. Else it is killed, with all its processes, after its second last checkpoint and a `moment`."""
    process = subprocess.Popen(
        call, cwd=CONFIGS.parent, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings
    )
    written: set[int] = set()
    while process.poll() is None and len(written) < 2:
        with contextlib.suppress(FileNotFoundError):
            written.add(last.stat().st_mtime_ns)
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    ended = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, error = process.communicate()
    assert not ended or process.returncode == 0, error.decode()[-3000:]
    return ended


def ends(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]:
    """The last checkpoint, the metrics and the curves of a run, free of what depends on its name and the time of day."""
    checkpoint = read(folder / "checkpoints/last.ckpt")
    del checkpoint["callbacks"]
    metrics = json.loads((folder / "metrics.json").read_text())
    board = EventAccumulator(str(folder)).Reload()
    curves = {
        # what was logged again is what was logged before
        name: sorted({(event.step, event.value) for event in board.Scalars(name)})
        for name in board.Tags()["scalars"]
        if name not in ("images_per_second", "epoch") and "seconds" not in name
    }
    return checkpoint, {key: value for key, value in metrics.items() if "seconds" not in key}, curves


@pytest.mark.parametrize(
    ("ranks", "kills"), [(1, 1), pytest.param(1, 4, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_killed_run_through_the_command_line(ranks: int, kills: int, tmp_path: Path, pictures: Path) -> None:
    call = [sys.executable, *arguments(pictures, tmp_path, "whole", ranks)]
    done = subprocess.run(call, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    call = [sys.executable, *arguments(pictures, tmp_path, "killed", ranks)]
    last = tmp_path / "killed/checkpoints/last.ckpt"
    for kill in range(kills + 1):
        if run_and_kill(call, last, random.Random().uniform(0, 0.3) if kill < kills else 300):
            break
        (last.parent / ".last.ckpt.tmp").write_bytes(b"half a checkpoint")
    for one, other in zip(ends(tmp_path / "killed"), ends(tmp_path / "whole"), strict=True):
        assert_same(one, other)

"""A training that was interrupted and resumed is the uninterrupted one, to the bit."""

import os
import random
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from small import small_training

from gq_lightning.callbacks import TDC, CheckpointFiles, ExactResume, LastCheckpoint, Preemption
from gq_lightning.data import ImageFolder
from gq_lightning.losses.adversary import Adversary
from gq_lightning.losses.discriminator import PatchDiscriminator
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


class Tell(pl.Callback):
    """Sends this process a signal in the hook of that name, when it is called for the `count`-th time."""

    def __init__(self, hook: str, count: int, number: int = signal.SIGTERM) -> None:
        self.calls = 0

        def tell(*_: Any, **__: Any) -> None:
            self.calls += 1
            if self.calls == count:
                os.kill(os.getpid(), number)

        setattr(self, hook, tell)


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
    tell: Tell | None = None,
    **settings: Any,
) -> tuple[Kept, dict[str, torch.Tensor]]:
    """Trains with all that has a state: TDC, averaged weights, the best and the last checkpoint. The weights are the averages."""
    torch.manual_seed(4)
    extra = {"adversary": Adversary(PatchDiscriminator(8, layers=1), start=3, warmup=2)} if adversary else {}
    length = {"max_steps": 12} if not {"max_epochs", "max_steps"} & settings.keys() else {}
    training = small_training("vit", learning_rate=1e-3, schedule=schedule, warmup_steps=3, accumulate=accumulate, **extra)
    torch.manual_seed(5)
    data = ImageFolder(
        str(pictures / "train"), str(pictures / "val"), crop="resized", scale=(0.3, 1), image_size=32, batch_size=4, workers=workers
    )
    callbacks = [
        ExactResume(),
        EMAWeightAveraging(decay=0.8, use_buffers=False),
        TDC(),
        Kill(kill, ask),
        Preemption(),
        *([tell] if tell else []),
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
        trainer.fit(training, data, ckpt_path=resume)
        assert kill < 0
    except Killed:
        pass
    return files, training.state_dict()


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
        steps = read(path)["global_step"]
        _, resumed = fit(tmp_path, pictures, notes=(notes := Notes()), resume=path, every=1000, **settings)
        assert_same(resumed, weights, path.name)
        assert_same(read(tmp_path / "last.ckpt"), final, path.name)
        assert list(notes.values) == [step for step in logged.values if step >= steps], path.name
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


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# the hook, how often it has been called by then, and after how many of the twelve steps the training ends
MOMENTS: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "in a step": (VALIDATE_BY_STEP, "on_before_optimizer_step", 5, 5),
    "between steps, in the middle of an epoch": (VALIDATE_BY_STEP, "on_train_batch_start", 8, 8),
    "in the last step of an epoch": (VALIDATE_BY_STEP, "on_train_batch_start", 5, 5),
    "in a step that a validation follows": (VALIDATE_BY_STEP, "on_train_batch_start", 6, 6),
    "in a validation": (VALIDATE_BY_STEP, "on_validation_batch_start", 4, 6),  # the first is the sanity check's
    "in a validation by epoch": ({}, "on_validation_batch_start", 2, 5),
    "in an accumulation": ({"accumulate": 2, **VALIDATE_BY_STEP}, "on_train_batch_start", 6, 4),
    "while the discriminator learns": ({"adversary": True, **VALIDATE_BY_STEP}, "on_before_optimizer_step", 12, 8),
    "in the last step": (VALIDATE_BY_STEP, "on_train_batch_start", 12, 12),
}


QUICK = ("in a step", "in a validation by epoch", "in an accumulation", "while the discriminator learns")


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("moment", [moment if moment in QUICK else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS])
def test_told_to_stop(moment: str, tmp_path: Path, pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM: the step is made, and the validation that is due; then it is saved, and resumes as the training that never stopped."""
    settings, hook, count, step = MOMENTS[moment]
    _, weights = fit(tmp_path / "whole", pictures, notes=(logged := Notes()), every=1000, **settings)
    notes = Notes()
    with pytest.raises(SIGTERMException) as stopped:
        fit(tmp_path, pictures, notes=notes, every=1000, tell=Tell(hook, count), **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    last = tmp_path / "last.ckpt"
    words = f"stopped by SIGTERM after step {step}: {last} is written; the same command with --ckpt_path last resumes from there"
    assert capfd.readouterr().err.splitlines()[-1] == words
    assert torch.load(last, weights_only=True)["global_step"] == step
    _, resumed = fit(tmp_path, pictures, notes=notes, resume=last, every=1000, **settings)
    assert_same(resumed, weights)
    assert_same(read(last), read(tmp_path / "whole/last.ckpt") | {"callbacks": read(last)["callbacks"]})
    for key, values in notes.values.items():
        assert_same(values, {name: logged.values[key][name] for name in values}, f"logged at {key}")


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_train_end"])
def test_told_to_stop_where_nothing_is_to_be_saved(hook: str, tmp_path: Path, pictures: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SIGTERMException) as stopped:
        fit(tmp_path, pictures, notes=Notes(), every=1000, tell=Tell(hook, 1), max_steps=2)
    assert stopped.value.code == 143
    line = capfd.readouterr().err.splitlines()[-1]
    if hook == "on_train_end":
        assert line.startswith(f"stopped by SIGTERM after step 2: {tmp_path}/last.ckpt is as it was; ")
    else:
        assert line.startswith("stopped by SIGTERM after step 0: there is no checkpoint; ")
        assert not list(tmp_path.iterdir())


ONE_TASK = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "7"}


@pytest.mark.usefixtures("_handlers")
@pytest.mark.filterwarnings("ignore:The `srun` command is available:UserWarning")
@pytest.mark.parametrize("trouble", [None, "Job is gone", "no scontrol"])
def test_slurm_takes_its_time_back(
    trouble: str | None, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR1 before the time limit: saved at the end of the step, and the job is back in its queue."""
    (tmp_path / "bin").mkdir()
    scontrol, calls = tmp_path / "bin/scontrol", tmp_path / "calls"
    if trouble != "no scontrol":
        scontrol.write_text(f"#!/bin/sh\necho $* >>{calls}\n" + (f"echo {trouble} >&2; exit 1\n" if trouble else ""))
        scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name, value in ONE_TASK.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    if trouble is None:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(SIGTERMException) as stopped:
        fit(tmp_path, pictures, notes=Notes(), every=1000, tell=Tell("on_before_optimizer_step", 7, signal.SIGUSR1))
    assert stopped.value.code == 128 + signal.SIGUSR1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"stopped by SIGUSR1 after step 7: {tmp_path}/last.ckpt is written; ")
    if trouble is None:
        assert line.endswith("job 6_2 is requeued")
        assert calls.read_text() == "requeue 6_2\n"
    else:
        assert "job 7 could not be requeued (" in line and trouble in line.replace("No such file or directory: 'scontrol'", "no scontrol")
        assert line.endswith("): submit it again")
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's own, which would be left behind"


def test_ranks_and_batches_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    training, drawn = small_training("vit"), []
    for epoch, batch, rank in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        trainer = SimpleNamespace(datamodule=SimpleNamespace(seed=3), current_epoch=epoch, global_rank=rank)
        ExactResume().on_train_batch_start(trainer, training, None, batch)  # type: ignore[arg-type]
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert drawn[0] == drawn[4]
    for numbers in zip(*drawn[:4], strict=True):
        assert len(set(numbers)) == 4

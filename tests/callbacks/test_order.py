"""In what order a real trainer calls its callbacks."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from small import CONFIGS

from gq_lightning.callbacks import Advice, Export, GaussianQuant, LastCheckpoint
from gq_lightning.callbacks.order import ORDER, in_order
from gq_lightning.cli.runs import SaveConfig
from gq_lightning.cli.training import CommandLine

FILES = ("base", "backbone/vit_small", "data/photographs", "scale/smoke", "machine/cpu", "quantizer/gq")
USERS = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/l1, filename: least}
    - class_path: gq_lightning.callbacks.TDC
    - class_path: lightning.pytorch.callbacks.DeviceStatsMonitor
    - class_path: gq_lightning.callbacks.GaussianQuant
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/psnr}
"""


def names(tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "users.yaml").write_text(USERS)
    paths = [*(CONFIGS / f"{name}.yaml" for name in FILES), tmp_path / "users.yaml"]
    configs = [word for path in paths for word in ("--config", str(path))]
    small = ["--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"]
    command_line = CommandLine([*configs, *small, f"--runs={tmp_path}", *more], run=False)
    return [type(callback).__name__ for callback in command_line.trainer.callbacks]


def test_the_order_of_a_run(tmp_path: Path) -> None:
    assert names(tmp_path, "--ema_decay=0.9", "--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=false") == [
        "ExactResume",
        "NonFinite",
        "LearningRateMonitor",
        "Dashboard",
        "Reconstructions",
        "Diagnostics",
        "BrokenPictures",
        "Outset",
        "TokenWriter",
        "ProgressBar",
        "Preemption",
        "LostRanks",
        "EMAWeightAveraging",
        # as the file has them
        "TDC",
        "DeviceStatsMonitor",
        "GaussianQuant",
        "EarlyStopping",
        "Export",
        "Advice",
        "Acceleration",
        "ModelCheckpoint",
        "ModelCheckpoint",
        "LastCheckpoint",
    ]


def test_what_is_left_out_leaves_no_gap(tmp_path: Path) -> None:
    more = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.enable_model_summary=false")
    found = names(tmp_path, *more, "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/psnr")
    assert not {"ProgressBar", "LearningRateMonitor", "EMAWeightAveraging"} & set(found)
    assert found[found.index("LostRanks") + 1 : found.index("Export")] == ["TDC", "GaussianQuant", "EarlyStopping"]


def test_a_subclass_has_the_place_of_its_class() -> None:
    class Mine(GaussianQuant):
        pass

    class MyBar(RichProgressBar):
        pass

    class MyExport(Export):
        pass

    given = [LastCheckpoint(), ModelCheckpoint(), SaveConfig.__new__(SaveConfig), Advice(), MyExport(), Mine(), LambdaCallback(), MyBar()]
    assert in_order(given) == [given[7], given[5], given[6], given[4], given[3], given[2], given[1], given[0]]


@pytest.mark.parametrize("later", [EarlyStopping, GaussianQuant])
def test_equals_stay_as_given(later: type) -> None:
    callbacks = [LambdaCallback(), later(monitor="x") if later is EarlyStopping else later()]
    assert in_order(callbacks) == callbacks
    assert in_order(callbacks[::-1]) == callbacks[::-1]


def test_every_place_has_a_reason() -> None:
    assert all(ORDER.values())
    assert SaveConfigCallback in ORDER

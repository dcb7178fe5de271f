"""Every option that `fit --help` offers, with sensible and senseless values, on a tiny training: it works, or is refused in one line.

All of it takes minutes (`make test-all`); some of it is tried each time.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from small import CONFIGS

from gq_lightning.cli.main import main
from gq_lightning.cli.options import OF_TOKENIZERS, REPLACED
from killed import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore")
SOME = {"trainer.devices", "trainer.barebones", "trainer.precision", "trainer.profiler", "optimizer", "threads", "model.learning_rate"}
# option -> values that work, values that are refused
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "config": ([], ["nowhere.yaml"]),
    "seed_everything": ([3, "true", "false"], ["x"]),
    "trainer": ([], ["nowhere.yaml"]),
    "trainer.accelerator": (["cpu", "auto"], ["tpu", "x"]),
    "trainer.strategy": (["auto", "single_device"], ["x", "deepspeed", "fsdp"]),
    "trainer.devices": ([1, "auto"], [0, "x"]),
    "trainer.num_nodes": ([1], [0]),
    "trainer.precision": (["32-true", "bf16-mixed"], ["16-mixed", "transformer-engine", "16-true", "bf16-true", "64-true", "x"]),
    "trainer.logger": (["false", "true", "CSVLogger --trainer.logger.save_dir=curves"], ["CSVLogger", "CometLogger", "MLFlowLogger", "x"]),
    "trainer.callbacks": (["LearningRateMonitor", "RichModelSummary", "RichProgressBar --trainer.enable_progress_bar=true"], ["x"]),
    "trainer.fast_dev_run": (["true", 1, "false"], ["x"]),
    "trainer.max_epochs": ([1, -1], ["x", -2]),
    "trainer.min_epochs": ([1], ["x"]),
    "trainer.max_steps": ([1], ["x", -2]),
    "trainer.min_steps": ([1], ["x"]),
    "trainer.max_time": (["00:00:01:00"], ["x"]),
    "trainer.limit_train_batches": ([1, 0.5], [-1]),
    "trainer.limit_val_batches": ([0, 1, 0.5], [-1]),
    "trainer.limit_test_batches": ([1], [-1]),
    "trainer.limit_predict_batches": ([1], [-1]),
    "trainer.overfit_batches": ([0], [1]),
    "trainer.val_check_interval": ([1, 0.5, "null"], [0, -1]),
    "trainer.check_val_every_n_epoch": ([1, "null"], [0]),
    "trainer.num_sanity_val_steps": ([0, 1, -1], ["x"]),
    "trainer.log_every_n_steps": ([1, 0], [-1]),
    "trainer.enable_checkpointing": (["true"], ["false"]),
    "trainer.enable_progress_bar": (["true", "false"], ["x"]),
    "trainer.enable_model_summary": (["true", "false"], ["x"]),
    "trainer.accumulate_grad_batches": ([1], [2]),
    "trainer.gradient_clip_val": (["null"], [1.0]),
    "trainer.gradient_clip_algorithm": (["norm"], ["value"]),
    "trainer.deterministic": (["true", "warn"], ["x"]),
    "trainer.benchmark": (["true"], ["x"]),
    "trainer.inference_mode": (["false"], ["x"]),
    "trainer.use_distributed_sampler": (["false"], ["x"]),
    "trainer.profiler": (["simple", "advanced"], ["x"]),
    "trainer.detect_anomaly": (["true"], ["x"]),
    "trainer.barebones": (["false"], ["true"]),
    "trainer.plugins": (["lightning.pytorch.plugins.environments.LightningEnvironment"], ["x"]),
    "trainer.sync_batchnorm": (["true"], ["x"]),
    "trainer.reload_dataloaders_every_n_epochs": ([0], [1, -1]),
    "trainer.enable_autolog_hparams": (["false"], ["x"]),
    "trainer.model_registry": (["null"], ["x"]),
    "model": ([], ["nowhere.yaml"]),
    "model.backbone": (["gq_lightning.backbones.UNet --model.backbone.channels=32"], ["x"]),
    "model.quantizer": (["gq_lightning.quantizers.FiniteScalarQuantizer"], ["x"]),
    "model.loss": (["{pixel: l1, lpips_weight: 0.0}"], ["null", "x"]),
    "model.loss.pixel": (["l1"], ["x"]),
    "model.loss.lpips_weight": ([0.0], ["x", -1]),
    "model.loss.lpips_network": (["alex"], ["x"]),
    "model.loss.lpips_share": ([0.5], [2]),
    "model.loss.learned_variance": (["true"], ["x"]),
    "model.learning_rate": ([1e-3, 0], [-1, "x", ".nan"]),
    "model.betas": (["[0.5,0.9]"], ["[1,1]", 0.9]),
    "model.weight_decay": ([0.1], [-1]),
    "model.warmup_steps": ([2], [-1]),
    "model.schedule": (["cosine"], ["x"]),
    "model.gradient_clip": ([1.0], [0]),
    "model.accumulate": ([2], [0]),
    "model.adversary": (["{discriminator: {width: 8, layers: 1}, start: 0}"], ["x"]),
    "data": ([], ["x"]),
    "data.init_args.batch_size": ([2], [0, 100]),
    "data.init_args.evaluation_batch_size": ([1], [0]),
    "data.init_args.image_size": ([64], [0, 36]),
    "data.init_args.workers": ([1], [-1]),
    "name": (["some name"], []),
    "runs": (["other"], ["/dev/null"]),
    "overwrite": (["true"], ["x"]),
    "ema_decay": ([0.9], [2, "x"]),
    "init_from": (["null"], ["nowhere"]),
    "train": (["all"], ["decoder", "x"]),
    "backbone_image_size": ([32, "null"], [64, "x"]),
    "threads": ([1, "null"], [0, -1, "x"]),
    "checkpoint": ([], ["nowhere.yaml"]),
    "checkpoint.dirpath": ([], ["x"]),
    "checkpoint.filename": (["{epoch}-{step}", "null"], ["last"]),
    "checkpoint.monitor": (["val/ssim", "null"], ["val/x"]),
    "checkpoint.verbose": (["true"], ["x"]),
    "checkpoint.save_last": (["false"], ["true", "link"]),
    "checkpoint.save_top_k": ([0, 2, -1], [-2]),
    "checkpoint.save_on_exception": (["false"], ["true"]),
    "checkpoint.save_weights_only": (["true"], ["x"]),
    "checkpoint.mode": (["min"], ["x"]),
    "checkpoint.auto_insert_metric_name": (["false"], ["x"]),
    "checkpoint.every_n_train_steps": ([0], [1, -1]),
    "checkpoint.train_time_interval": ([], ["0:0:1"]),
    "checkpoint.every_n_epochs": ([1], [-1]),
    "checkpoint.save_on_train_epoch_end": (["false"], ["true"]),
    "checkpoint.enable_version_counter": (["true"], ["x"]),
    "last": ([], ["nowhere.yaml"]),
    "last.every_n_train_steps": ([1], [0]),
    "export": ([], ["nowhere.yaml"]),
    "export.rfid": (["false"], ["x"]),
    "export.columns": ([1], [0]),
    "export.gaussian_rfid": (["false"], ["x"]),
    "export.weights": (["best", "last"], ["x"]),
    "advice": ([], ["nowhere.yaml"]),
    "advice.patience": ([5], [0]),
    "acceleration": ([], ["nowhere.yaml"]),
    "acceleration.compile": (["false"], ["x"]),
    "acceleration.channels_last": (["true"], ["x"]),
    "ckpt_path": (["last", "null"], ["best", "x", "hpc", "registry"]),
    "weights_only": (["true"], ["x"]),
    # not offered any more
    "optimizer": (["null"], ["SGD"]),
    "lr_scheduler": (["null"], ["StepLR"]),
}
TRIALS = [
    pytest.param(option, value, works, marks=[] if option in SOME else pytest.mark.slow, id=f"{option}={value}")
    for option, values in OPTIONS.items()
    for works, given in zip((True, False), values, strict=True)
    for value in given
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def fit(pictures: Path) -> list[str]:
    files = ("base", "backbone/vit_small", "data/folder", "scale/smoke", "machine/cpu")
    return [
        *("fit", *(word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml")))),
        *(
            f"--data.init_args.{name}"
            for name in (f"root={pictures}/train", f"validation_root={pictures}/val", "batch_size=4", "workers=0")
        ),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
        *("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=2", "--export.rfid=false", "--export.columns=2"),
        *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--runs=runs", "--name=a"),
    ]


@pytest.mark.parametrize(("option", "value", "works"), TRIALS)
def test_it_works_or_is_refused_in_a_line(
    option: str, value: Any, works: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = str(value).split(" ") if "{" not in str(value) and option != "name" else [str(value)]
    quantizer = ["--model.quantizer.codebook_size=256", "--model.quantizer.latent_channels=4"]
    status = main([*fit(pictures), *([] if option == "model.quantizer" else quantizer), f"--{option}={words[0]}", *words[1:]])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (status, len(lines)) == ((0, 0) if works else (2, 1)), lines


def test_all_that_help_offers_is_tried() -> None:
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        main(["fit", "--help"])
    offered = set(re.findall(r"^ {2}(?:-\w \w+, )?--([\w.]+)", text.getvalue(), re.MULTILINE))
    offered = {option for option in offered if not option.endswith(".help")} - {"help", "print_config"}
    assert len(offered) > 80 and "optimizer" not in offered and "lr_scheduler" not in offered
    assert offered <= set(OPTIONS), sorted(offered - set(OPTIONS))
    assert set(REPLACED | OF_TOKENIZERS) <= set(OPTIONS)

"""What a run promises by its command line: which options win when it goes on, where its files lie, what it says and what it refuses."""

import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from small import CONFIGS, small_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.callbacks import Diagnostics
from gq_lightning.cli.main import main
from gq_lightning.cli.training import CommandLine
from gq_lightning.files import RunFolder
from gq_lightning.training.optimization import planned_steps
from killed import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a fit on 22 pictures in batches of four: five batches an epoch, two steps and a validation of five pictures."""
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"))
    files = ("base", "backbone/vit_small", "data/folder", "scale/smoke", "machine/cpu")
    return [
        *(word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml"))),
        *(
            f"--data.init_args.{name}"
            for name in (f"root={pictures}/train", f"validation_root={pictures}/val", "batch_size=4", "workers=0")
        ),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0"),
        *("--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1.0", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
        *("--export.rfid=false", "--export.columns=2"),
    ]


@pytest.fixture(scope="module")
def finished(fit: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["fit", *fit, f"--runs={runs}", "--name=a", "--trainer.max_steps=4"]) == 0
    return runs / "a"


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# Going on


def test_what_is_asked_for_wins_over_what_a_checkpoint_holds(fit: list[str], tmp_path: Path) -> None:
    """Every option that a checkpoint stores too; what it alone stores, moments and progress, is its own."""
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", "--model.schedule=cosine", "--model.warmup_steps=1"]
    assert main([*call, "--model.weight_decay=0.1", "--ema_decay=0.5"]) == 0
    more = ["--model.learning_rate=5e-4", "--model.betas=[0.5,0.6]", "--model.weight_decay=0.2", "--model.quantizer.init_args.tdc_beta=1.5"]
    assert main([*call, *more, "--trainer.max_steps=8", "--ckpt_path=last"]) == 0
    last = checkpoint(tmp_path / "a/checkpoints/last.ckpt")
    groups, schedule = last["optimizer_states"][0]["param_groups"], last["lr_schedulers"][0]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert {group["betas"] for group in groups} == {(0.5, 0.6)}
    assert schedule["base_lrs"] == [5e-4, 5e-4]
    # cosine over the eight steps of now, after all of them
    assert [group["lr"] for group in groups] == pytest.approx([5e-4 * 0.01] * 2)
    assert last["global_step"] == 8 and {int(state["step"]) for state in last["optimizer_states"][0]["state"].values()} == {8}
    moved = math.log(float(last["state_dict"]["tokenizer.quantizer.tdc.lambda_mean"]))
    assert round(abs(moved), 2) >= round(2 * math.log(1.5), 2), "six steps of 1.5"
    config = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    assert (config["model"]["learning_rate"], config["model"]["weight_decay"]) == (5e-4, 0.2)
    # the curve goes on where it was, with the learning rates that were really used
    events = EventAccumulator(str(tmp_path / "a")).Reload()
    rates = {event.step: event.value for event in events.Scalars("lr-AdamW/pg1")}
    assert sorted(rates) == list(range(8)) and rates[1] == pytest.approx(1e-3, rel=0.6) and max(list(rates.values())[2:]) <= 5e-4


def test_averages_may_come_and_go(fit: list[str], tmp_path: Path) -> None:
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", "--ckpt_path=last"]
    assert main([*call, "--ema_decay=0.9"]) == 0
    averaged = checkpoint(tmp_path / "a/checkpoints/last.ckpt")
    # nothing is left to train: without averages the tokenizer is that of the weights which trained
    assert main(call) == 0
    weights = ImageTokenizer.from_pretrained(tmp_path / "a/tokenizer").state_dict()
    for name, value in weights.items():
        assert torch.equal(value, averaged["current_model_state"][f"tokenizer.{name}"]), name
    assert main([*call, "--trainer.max_steps=3"]) == 0
    assert "current_model_state" not in checkpoint(tmp_path / "a/checkpoints/last.ckpt")
    assert main([*call, "--trainer.max_steps=4", "--ema_decay=0.9"]) == 0
    assert "current_model_state" in checkpoint(tmp_path / "a/checkpoints/last.ckpt")


def test_an_adversary_may_come_and_go(fit: list[str], finished: Path, tmp_path: Path) -> None:
    """A run that began without goes on with one, under its own name or another, and without it again."""
    path = finished / "checkpoints/last.ckpt"
    adversary = ["--model.adversary.discriminator.width=8", "--model.adversary.discriminator.layers=1", "--model.adversary.start=4"]
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=b"]
    assert main([*call, f"--ckpt_path={path}", *adversary, "--trainer.max_steps=6"]) == 0
    last = checkpoint(tmp_path / "b/checkpoints/last.ckpt")
    assert len(last["optimizer_states"]) == 2 and last["global_step"] == 6
    assert {int(state["step"]) for state in last["optimizer_states"][1]["state"].values()} == {2}
    assert main([*call, "--ckpt_path=last", "--trainer.max_steps=7"]) == 0
    last = checkpoint(tmp_path / "b/checkpoints/last.ckpt")
    assert len(last["optimizer_states"]) == 1 and not [name for name in last["state_dict"] if name.startswith("adversary.")]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.backbone.init_args.width=64", "the checkpoint has one of shape"),
        (
            "--model.quantizer.init_args.exact_divergence=true",
            "tdc.lambda_max: the checkpoint has one of shape (), the model none: give",
        ),
        ("--model.quantizer.init_args.seed=7", "these weights belong to another codebook"),
        ("--seed_everything=3", "seed_everything 3: the training began with 0"),
    ],
)
def test_what_cannot_be_changed_is_refused_by_name(
    option: str, words: str, fit: list[str], finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "checkpoints/last.ckpt").read_bytes()
    call = ["fit", *fit, f"--runs={finished.parent}", "--name=a", "--trainer.max_steps=9", "--ckpt_path=last"]
    assert main([*call, option]) == 2
    line = last_line(capfd)
    assert line.startswith("error: ") and words in line
    assert (finished / "checkpoints/last.ckpt").read_bytes() == before


def test_best_works_beside_last(
    fit: list[str], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = (finished / "config.yaml").read_bytes()
    for which in ("best", "last"):
        assert main(["validate", *fit, f"--runs={finished.parent}", "--name=a", f"--ckpt_path={which}"]) == 0
        assert f"Loaded model weights from the checkpoint at {finished}/checkpoints/{which}.ckpt" in caplog.text
    assert (finished / "config.yaml").read_bytes() == config
    (tmp_path / "a").mkdir()
    assert main(["fit", *fit, f"--runs={tmp_path}", "--name=a", "--ckpt_path=best"]) == 2
    line = f"error: {tmp_path}/a/checkpoints/best.ckpt: no such checkpoint: give --ckpt_path last, best or a file: {tmp_path}"
    assert last_line(capfd).startswith(line)


def test_a_run_is_not_mixed_with_the_checkpoint_of_another(fit: list[str], finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = finished.parent / "other"
    other.mkdir()
    (other / "config.yaml").write_text("{}")
    call = ["fit", *fit, f"--runs={finished.parent}", "--name=other", f"--ckpt_path={finished}/checkpoints/last.ckpt"]
    assert main(call) == 2
    assert "a run exists there already" in last_line(capfd)


# Length and validation


def count(training: Any, batches: int, **settings: Any) -> tuple[int, float]:
    """Steps that were made, and those that the schedule was told of."""
    told: list[float] = []

    class Ask(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            told.append(planned_steps(trainer, training.accumulate))

    images = torch.rand(batches * 2, 3, 32, 32) * 2 - 1
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Ask()],
        **settings,
    )
    trainer.fit(training, torch.utils.data.DataLoader(images, batch_size=2))  # type: ignore[arg-type]
    return trainer.global_step, told[0]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 4},
        {"max_epochs": 2},
        {"max_epochs": 2, "max_steps": 3},
        {"max_epochs": 1, "max_steps": 50},
        {"max_epochs": 2, "limit_train_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 0.5},
    ],
    ids=str,
)
def test_the_schedule_is_as_long_as_the_training(accumulate: int, limits: dict[str, Any]) -> None:
    """Five batches an epoch: 1, 2, 3 and 8 of them leave 0, 1, 2 and 5 over. At the end the cosine is at its end."""
    training = small_training("vit", learning_rate=1e-3, schedule="cosine", accumulate=accumulate)
    made, planned = count(training, 5, **limits)
    assert planned == made
    assert training.optimizers().param_groups[0]["lr"] == pytest.approx(1e-5)


def validations(folder: Path) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("val/psnr")]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.val_check_interval=null", "--trainer.max_steps=20"], list(range(1, 20, 2))),
        (["--trainer.val_check_interval=5000", "--trainer.max_steps=20"], list(range(1, 20, 2))),
        pytest.param(["--trainer.val_check_interval=10", "--trainer.max_steps=20"], [9, 19], marks=slow),
        pytest.param(
            ["--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=2", "--trainer.max_steps=20"], [9, 19], marks=slow
        ),
        pytest.param(
            ["--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=9", "--trainer.max_steps=20"],
            list(range(1, 20, 2)),
            marks=slow,
        ),
        pytest.param(["--trainer.val_check_interval=1.0", "--trainer.max_steps=-1", "--trainer.max_epochs=3"], [4, 9, 14], marks=slow),
        pytest.param(
            ["--trainer.val_check_interval=null", "--trainer.max_steps=-1", "--trainer.max_epochs=4", "--model.accumulate=2"],
            None,
            marks=slow,
        ),
    ],
)
def test_every_run_validates(options: list[str], steps: list[int] | None, fit: list[str], tmp_path: Path) -> None:
    assert main(["fit", *fit, f"--runs={tmp_path}", "--name=a", *options]) == 0
    found = validations(tmp_path / "a")
    assert found == steps if steps is not None else len(found) >= 4
    assert (tmp_path / "a/checkpoints/best.ckpt").is_file()


def test_the_outset(fit: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folder, pictures and steps at the start; the time that is left, from the steps made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gq_lightning.callbacks.watching.outset.SECONDS", 0.0)
        assert main(["fit", *fit, f"--runs={tmp_path}", "--name=a", "--trainer.max_steps=20", "--model.accumulate=2"]) == 0
    words = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}/a: 20 steps of 8 pictures, training on 22 of them, validating on 5" in words
    [line] = [line for line in words if "seconds a step: about" in line]
    assert line.endswith("left, validations and the last evaluation not counted")


# Loggers


class Pictures(Logger):
    """Stands in for Weights & Biases, whose logger takes pictures."""

    name = version = "pictures"
    seen: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        type(self).seen = {"metrics": {}, "pictures": []}

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen["metrics"].setdefault(step, {}).update(metrics)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.seen["pictures"].append((key, images[0].size, step))


class Client(Pictures):
    """Stands in for MLflow, whose client takes pictures."""

    run_id = "7"
    log_image = property()  # type: ignore[assignment]

    @property
    def experiment(self) -> Any:
        class Experiment:
            def log_image(self, run_id: str, image: Any, *, key: str, step: int) -> None:
                Client.seen["pictures"].append((key, image.size, step))

        return Experiment()


@pytest.mark.parametrize(
    "loggers",
    [
        pytest.param(["lightning.pytorch.loggers.CSVLogger"], marks=slow),
        pytest.param(["test_promises.Pictures"], marks=slow),
        ["test_promises.Client"],
        ["test_promises.Pictures", "lightning.pytorch.loggers.TensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"],
        pytest.param([], marks=slow),
    ],
    ids=lambda loggers: "+".join(logger.rpartition(".")[2] for logger in loggers) or "none",
)
def test_whatever_the_logger_is(loggers: list[str], fit: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's folder is the same, the run goes on, and scalars and pictures are where they are wanted."""
    monkeypatch.setitem(sys.modules, "test_promises", sys.modules[__name__])
    places = {"TensorBoardLogger": {"save_dir": f"{tmp_path}/board"}, "CSVLogger": {"save_dir": f"{tmp_path}/table"}}
    described = [{"class_path": path, "init_args": places.get(path.rpartition(".")[2], {})} for path in loggers]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": described or False}}))
    call = ["fit", *fit, f"--runs={tmp_path}/runs", "--name=a", f"--config={tmp_path}/loggers.yaml", "--ckpt_path=last"]
    assert main(call) == 0
    run = RunFolder(tmp_path / "runs/a")
    for path in (run.config, run.metrics, run.reconstructions, run.best, run.last, run.tokenizer / "config.json"):
        assert path.is_file(), path
    assert main([*call, "--trainer.max_steps=4"]) == 0
    assert checkpoint(run.last)["global_step"] == 4
    for kind in (Pictures, Client):
        if f"test_promises.{kind.__name__}" in loggers:
            seen = kind.seen
            assert sorted(seen["metrics"]) == [2, 3] and {"loss", "val/psnr", "final/psnr", "lr-AdamW/pg1"} <= set(seen["metrics"][3])
            assert [(key, step) for key, _, step in seen["pictures"]] == [(name, 3) for name in ("reconstructions", "whole/0", "whole/1")]
    if "lightning.pytorch.loggers.TensorBoardLogger" in loggers:
        boards = sorted({str(path.parent) for path in (tmp_path / "board").rglob("events.*")})
        assert EventAccumulator(boards[-1]).Reload().Tags()["images"] == ["reconstructions", "whole/0", "whole/1"]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=slow), 3])
def test_steps_mean_the_same_on_every_axis(accumulate: int, fit: list[str], tmp_path: Path) -> None:
    """Under accumulation, with validations, after resuming: scalars, pictures, histograms and the last evaluation count steps from 0."""
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", f"--model.accumulate={accumulate}", "--ckpt_path=last"]
    call.append("--trainer.val_check_interval=4")
    assert main([*call, "--trainer.max_steps=4"]) == 0
    assert main([*call, "--trainer.max_steps=8"]) == 0
    events = EventAccumulator(str(tmp_path / "a"), {"images": 0, "histograms": 0}).Reload()
    for name in ("loss", "images_per_second", "lr-AdamW/pg1", "tdc/lambda_mean", "bits/mean"):
        assert sorted({event.step for event in events.Scalars(name)}) == list(range(8)), name
    # five batches an epoch: with three of them a step, an epoch has two steps; validations after batches 4, 8, 12, ...
    after = [3, 7] if accumulate == 1 else [0, 2, 3, 5, 7]
    assert [event.step for event in events.Scalars("val/psnr")] == after
    assert [event.step for event in events.Images("reconstructions")] == after
    assert sorted({event.step for event in events.Histograms("bits_per_token")}) == list(range(8))
    assert [event.step for event in events.Scalars("final/psnr")] == [3, 7]
    epochs = {event.step: event.value for event in events.Scalars("epoch")}
    assert epochs[7] == (1 if accumulate == 1 else 3)


def test_pictures_a_second_are_those_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the time of validations, and counted in pictures whatever makes a step."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    training, logged = small_training("vit"), []
    monkeypatch.setattr(training, "log_dict", lambda values: logged.append(values["images_per_second"]))

    class Fake:
        global_step, log_every_n_steps, world_size, loggers, is_global_zero = 1, 1, 2, (), True
        datamodule = type("Data", (), {"skipped": 0})

    diagnostics, batch = Diagnostics(), torch.zeros(4, 3, 8, 8)
    diagnostics.on_train_start(Fake, training)  # type: ignore[arg-type]
    for complete, validated in ((False, False), (True, True), (True, False)):
        training.step_complete = complete
        diagnostics.on_train_batch_start(Fake, training, batch, 0)  # type: ignore[arg-type]
        now[0] += 2
        diagnostics.on_train_batch_end(Fake, training, {"posterior": None}, batch, 0)  # type: ignore[arg-type]
        if validated:
            diagnostics.on_validation_start(Fake, training)  # type: ignore[arg-type]
            now[0] += 100
    assert logged == [4.0, 4.0]


# The method


def kinds(fit: list[str], *options: str) -> list[str]:
    return [type(callback).__name__ for callback in CommandLine([*fit, *options], run=False).trainer.callbacks]


@pytest.mark.parametrize("given", [[], ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/psnr"]])
@pytest.mark.parametrize(
    ("quantizer", "wanted"),
    [("gq", True), ("gq_exact", True), ("gaussian", True), ("tokenbridge", True), ("tokenbridge_tdc", True), ("vq", False), ("fsq", False)],
)
def test_the_method_follows_from_the_quantizer(quantizer: str, wanted: bool, given: list[str], fit: list[str], tmp_path: Path) -> None:
    """Whatever callbacks are given, and in no config."""
    file = CONFIGS / f"quantizer/{quantizer}.yaml"
    assert "callbacks" not in yaml.safe_load(file.read_text()).get("trainer", {})
    sizes = ["--model.quantizer.init_args.codebook_size=256"] if quantizer in ("gq", "gq_exact", "gaussian", "vq") else []
    base = [word for word in fit if "quantizer.init_args" not in word]
    found = kinds([*base, "--config", str(file), *sizes], f"--runs={tmp_path}", *given)
    assert [name in found for name in ("TDC", "GaussianQuant")] == [wanted, wanted]
    if given and wanted:
        places = [found.index(name) for name in ("TDC", "GaussianQuant", "EarlyStopping", "Export")]
        assert places == sorted(places)


def test_what_is_given_is_not_added(fit: list[str], tmp_path: Path) -> None:
    found = kinds(fit, f"--runs={tmp_path}", "--trainer.callbacks=gq_lightning.callbacks.GaussianQuant")
    assert found.count("GaussianQuant") == found.count("TDC") == 1


@pytest.mark.parametrize(("variant", "moves"), [("paper", True), ("fixed", False)])
def test_fixed_multipliers_are_a_plain_gaussian_vae(variant: str, moves: bool, fit: list[str], tmp_path: Path) -> None:
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", f"--model.quantizer.init_args.tdc_variant={variant}"]
    assert main([*call, "--trainer.callbacks=LambdaCallback"]) == 0
    state = checkpoint(tmp_path / "a/checkpoints/last.ckpt")["state_dict"]
    assert [float(state[f"tokenizer.quantizer.tdc.lambda_{name}"]) != 1 for name in ("min", "mean", "max")] == [moves] * 3


# Checkpoints' options


def test_the_best_k(fit: list[str], tmp_path: Path) -> None:
    """As many files as asked for, each with the metric that it was kept for; and the best of them are those."""
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", "--trainer.max_steps=6", "--trainer.val_check_interval=1"]
    assert main([*call, "--checkpoint.save_top_k=2", "--model.learning_rate=3e-3"]) == 0
    values = {event.step + 1: event.value for event in EventAccumulator(str(tmp_path / "a")).Reload().Scalars("val/psnr")}
    files = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    best = sorted(values, key=values.__getitem__)[-2:]
    assert files == {"last.ckpt", *(f"best-step={step}.ckpt" for step in best)}
    for step in best:
        assert checkpoint(tmp_path / f"a/checkpoints/best-step={step}.ckpt")["global_step"] == step


def test_a_metric_in_a_name_is_that_of_its_step(fit: list[str], tmp_path: Path) -> None:
    name = "--checkpoint.filename={step}-{loss:.2f}"
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", "--trainer.max_steps=4", "--checkpoint.monitor=loss", "--checkpoint.mode=min"]
    assert main([*call, name, "--checkpoint.save_top_k=-1", "--checkpoint.every_n_train_steps=2"]) == 0
    losses = {event.step + 1: event.value for event in EventAccumulator(str(tmp_path / "a")).Reload().Scalars("loss")}
    files = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    assert files == {"last.ckpt", *(f"step={step}-loss={losses[step]:.2f}.ckpt" for step in (2, 4))}


@slow
@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--checkpoint.save_top_k=0"], {"last.ckpt"}),
        (["--checkpoint.monitor=val/lpips", "--checkpoint.mode=min"], {"last.ckpt", "best.ckpt"}),
        (
            ["--checkpoint.monitor=null", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"],
            {"last.ckpt", "best-step=1.ckpt", "best-step=2.ckpt"},
        ),
        (["--checkpoint.monitor=null", "--checkpoint.save_on_train_epoch_end=true", "--trainer.max_steps=5"], {"last.ckpt", "best.ckpt"}),
        (["--checkpoint.every_n_epochs=2"], {"last.ckpt"}),
        (["--checkpoint.save_weights_only=true"], {"last.ckpt", "best.ckpt"}),
        (
            [
                "--checkpoint.filename=kept",
                "--checkpoint.enable_version_counter=true",
                "--checkpoint.save_top_k=-1",
                "--trainer.val_check_interval=1",
            ],
            {"last.ckpt", "kept.ckpt", "kept-v1.ckpt"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@slow
def test_a_checkpoint_option_does_what_lightning_says(options: list[str], files: set[str], fit: list[str], tmp_path: Path) -> None:
    assert main(["fit", *fit, f"--runs={tmp_path}", "--name=a", *options]) == 0
    assert {path.name for path in (tmp_path / "a/checkpoints").iterdir()} == files
    for name in files:
        ImageTokenizer.from_checkpoint(tmp_path / "a/checkpoints" / name)


@pytest.mark.parametrize(
    "options",
    [
        ["--checkpoint.save_top_k=2", "--checkpoint.filename=kept"],
        ["--checkpoint.filename=last"],
        ["--checkpoint.every_n_train_steps=2"],
        ["--checkpoint.every_n_train_steps=3", "--checkpoint.monitor=loss", "--trainer.log_every_n_steps=2"],
        ["--checkpoint.save_on_train_epoch_end=true"],
        ["--checkpoint.save_weights_only=true", "--ema_decay=0.9"],
        ["--checkpoint.dirpath=elsewhere"],
        ["--checkpoint.save_last=true"],
        ["--checkpoint.save_on_exception=true"],
        ["--checkpoint.train_time_interval=0:1:0"],
        ["--export.weights=best", "--trainer.limit_val_batches=0"],
        ["--export.weights=best", "--checkpoint.save_top_k=0"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_kept_as_asked_is_refused(
    options: list[str], fit: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *fit, f"--runs={tmp_path}", "--name=a", *options]) == 2
    line = last_line(capfd)
    assert line.startswith(f"error: {options[0].removeprefix('--').partition('=')[0].rpartition('.')[0]}.")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_best_weights_are_exported(fit: list[str], tmp_path: Path) -> None:
    """The best are the first here, since the learning rate spoils what follows."""
    call = ["fit", *fit, f"--runs={tmp_path}", "--name=a", "--trainer.max_steps=6", "--trainer.val_check_interval=1", "--ema_decay=0.5"]
    assert main([*call, "--export.weights=best", "--checkpoint.mode=min"]) == 0
    best, last = (ImageTokenizer.from_checkpoint(tmp_path / f"a/checkpoints/{name}.ckpt") for name in ("best", "last"))
    exported = ImageTokenizer.from_pretrained(tmp_path / "a/tokenizer")
    assert exported.fingerprint == best.fingerprint != last.fingerprint
    step = checkpoint(tmp_path / "a/checkpoints/best.ckpt")["global_step"]
    assert step < 6 and json.loads((tmp_path / "a/metrics.json").read_text())["weights"] == {"of": "best", "step": step}


# Measuring


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_no_random_model_is_measured(
    command: str, fit: list[str], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *fit, f"--runs={finished.parent}", "--name=a"]) == 2
    there = f"{finished}/checkpoints/best.ckpt, {finished}/checkpoints/last.ckpt"
    assert last_line(capfd) == f"error: no checkpoint to {command}: give --ckpt_path last, best or a file: {there}"
    assert main([command, *fit, f"--runs={tmp_path}", "--name=none"]) == 2
    assert "checkpoints has none" in last_line(capfd)
    assert main([command, *fit, f"--runs={finished.parent}", "--name=a", "--ckpt_path=gone.ckpt"]) == 2
    assert "gone.ckpt: no such checkpoint" in last_line(capfd)


def test_measuring_leaves_the_curves_alone(fit: list[str], finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("events.*")}
    assert before
    for command in ("validate", "predict"):
        assert main([command, *fit, f"--runs={finished.parent}", "--name=a", "--ckpt_path=best"]) == 0
    assert {path: path.read_bytes() for path in finished.rglob("events.*")} == before


@slow
@pytest.mark.parametrize(
    "call",
    [
        ["validate", "--verbose=false"],
        ["validate", "--weights_only=true"],
        ["validate", "--trainer.callbacks=LearningRateMonitor"],
        ["predict", "--return_predictions=true"],
        ["predict", "--trainer.limit_predict_batches=1"],
    ],
    ids=" ".join,
)
def test_what_the_other_commands_offer_works(call: list[str], fit: list[str], finished: Path) -> None:
    assert main([*call, *fit, f"--runs={finished.parent}", "--name=a", "--ckpt_path=last"]) == 0


# In Python


def test_a_runs_folder_is_a_tokenizer(finished: Path) -> None:
    whole = ImageTokenizer.from_pretrained(finished / "tokenizer")
    assert ImageTokenizer.from_pretrained(finished).fingerprint == whole.fingerprint
    assert ImageTokenizer.from_pretrained(finished / "checkpoints/last.ckpt").fingerprint == whole.fingerprint


def test_a_frozen_tokenizer_does_not_train_without_a_word(finished: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(finished)
    training = small_training("vit")
    training.tokenizer = tokenizer
    with pytest.raises(UserError, match=r"requires_grad_\(True\)"):
        count(training, 1, max_steps=1)
    before = [parameter.clone() for parameter in tokenizer.parameters()]
    tokenizer.train().requires_grad_(True)
    count(training, 1, max_steps=1)
    assert not all(torch.equal(old, new) for old, new in zip(before, tokenizer.parameters(), strict=True))

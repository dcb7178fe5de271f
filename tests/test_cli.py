"""The command line as a user calls it, on the shipped photographs at 32 pixels and a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small import CONFIGS, small_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.callbacks.gaussian_quant import another_codebook
from gq_lightning.cli.main import main
from gq_lightning.metrics import reconstruction
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer, TokenBridge

SMOKE = [
    *("--config", str(CONFIGS / "base.yaml")),
    *("--config", str(CONFIGS / "backbone/vit_small.yaml")),
    *("--config", str(CONFIGS / "data/photographs.yaml")),
    *("--config", str(CONFIGS / "scale/smoke.yaml")),
    *("--config", str(CONFIGS / "machine/cpu.yaml")),
    "--model.backbone.init_args.width=32",
    "--model.backbone.init_args.layers=1",
    "--model.quantizer.init_args.codebook_size=256",
    "--model.quantizer.init_args.latent_channels=4",
    "--trainer.enable_progress_bar=false",
]
# the hook's rFID needs minutes of CPU here; tests/metrics measures it
FIT = ["fit", *SMOKE, "--export.rfid=false", "--export.columns=3"]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke run."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
        assert main([*FIT, f"--runs={runs}", "--name=smoke", "--ema_decay=0.9"]) == 0
    return runs / "smoke"


def test_run_folder(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for name in (
        *("psnr", "ssim", "ms_ssim", "lpips", "bits_per_pixel", "codebook_usage", "gaussian_psnr", "gaussian_lpips"),
        *("bits_min", "bits_mean", "bits_max", "share_within_alpha", "images", "seconds"),
    ):
        assert isinstance(metrics[name], int | float), name
    assert metrics["bits_per_pixel"] == 0.25
    assert metrics["bits_min"] <= metrics["bits_mean"] <= metrics["bits_max"]
    assert metrics["protocol"]["data"]["split"] == "held-out photographs"
    assert size(run / "reconstructions.png")[0] > 300
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["image_size"] == 32
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_tensorboard_events(run: Path) -> None:
    events = EventAccumulator(str(run)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "loss/reconstruction", "loss/penalty", "val/psnr", "val/gaussian_psnr", "images_per_second", "memory_gib"} <= scalars
    assert {"tdc/lambda_min", "tdc/lambda_mean", "tdc/lambda_max", "bits/min", "bits/mean", "bits/max", "final/psnr"} <= scalars
    assert events.Tags()["histograms"] == ["bits_per_token"]
    assert events.Tags()["images"] == ["reconstructions", "whole/0", "whole/1"]
    # 20 steps of a factor 1.01 up or down, logged every 5
    moves = {round(np.log(event.value) / np.log(1.01)) for event in events.Scalars("tdc/lambda_mean")}
    assert moves
    assert moves <= set(range(-20, 21))


def test_exported_tokenizer_is_the_trained_one(run: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer")
    assert tokenizer.fingerprint == json.loads((run / "metrics.json").read_text())["tokenizer_fingerprint"]
    assert tokenizer.fixed_image_size == 32


def test_convert_gives_what_the_hook_wrote(run: Path, tmp_path: Path) -> None:
    for source in (run, run / "checkpoints/last.ckpt"):
        assert main(["convert", str(source), "--out", str(tmp_path / "tokenizer")]) == 0
        hook, command = (ImageTokenizer.from_pretrained(folder) for folder in (run / "tokenizer", tmp_path / "tokenizer"))
        assert hook.fingerprint == command.fingerprint


def test_convert_toanother_codebook(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def converted(*options: str) -> ImageTokenizer:
        assert main(["convert", str(run), "--out", str(tmp_path / "tokenizer"), *options]) == 0
        return ImageTokenizer.from_pretrained(tmp_path / "tokenizer")

    trained = converted()
    same = converted("--codebook", "iid", "--codebook-size", "256", "--prior-weight", "1", "--seed", "42")
    assert torch.equal(trained.quantizer.codewords, same.quantizer.codewords)
    other = converted("--codebook", "quantile", "--codebook-size", "16", "--prior-weight", "0")
    bridge = TokenBridge(16, latent_channels=4)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    features = trained.backbone.encode(images).movedim(1, -1)
    assert torch.equal(other.backbone.encode(images).movedim(1, -1), features), "the encoder is the trained one"
    assert torch.equal(other.encode(images), bridge.tokenize(features))
    assert (other.quantizer.bits_per_position, other.tokens_per_position, other.codebook_size) == (16, 4, 16)
    assert not torch.equal(converted("--seed", "1").encode(images), trained.encode(images))
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    training = small_training("vit", FiniteScalarQuantizer(16, levels=[16, 16, 16, 16]))
    checkpoint["tokenizer"], checkpoint["state_dict"] = training.tokenizer.description(), training.state_dict()
    torch.save(checkpoint, tmp_path / "fsq.ckpt")
    for source, option, value, words in (
        (tmp_path / "fsq.ckpt", "--seed", "1", "leave out --seed"),
        (run, "--codebook-size", "300000", "codebook_size"),
        (run, "--prior-weight", "2", "prior_weight"),
    ):
        assert main(["convert", str(source), "--out", str(tmp_path / "no"), option, value]) == 2
        assert words in capfd.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "no").exists()


def test_an_exact_divergence_keeps_its_codebook_size() -> None:
    """With another one the encoder's features would stand for other posteriors than those it was trained with."""
    trained = GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True)
    with pytest.raises(UserError, match="leave out --codebook_size"):
        another_codebook(trained, {"codebook_size": 16}, "here")
    other = another_codebook(trained, {"seed": 1}, "here")
    features = torch.randn(3, 8)
    assert torch.equal(other.posterior(features).log_variance, trained.posterior(features).log_variance)  # type: ignore[attr-defined]


def test_encode_decode_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (50, 75, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(pictures / "colour.jpg")
    Image.fromarray(pixels[..., 0]).save(pictures / "grey.png")
    Image.fromarray(pixels[..., :3]).convert("CMYK").save(pictures / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels[..., :3]).save(pictures / "turned.jpg", exif=exif)
    tokenizer = ["--tokenizer", str(run / "tokenizer")]
    assert main(["encode", *tokenizer, str(pictures), "--out", str(tmp_path / "tokens")]) == 0
    assert "50x75 padded to 56x80" in capsys.readouterr().out
    assert main(["decode", *tokenizer, str(tmp_path / "tokens"), "--out", str(tmp_path / "back")]) == 0
    sizes = {path.name: size(path) for path in (tmp_path / "back").iterdir()}
    assert sizes == {"colour.png": (75, 50), "grey.png": (75, 50), "cmyk.png": (75, 50), "turned.png": (50, 75)}
    out = tmp_path / "metrics.json"
    assert main(["evaluate", *tokenizer, "--data", str(pictures), "--out", str(out), "--no-rfid", "--workers", "0"]) == 0
    metrics = json.loads(out.read_text())
    assert metrics["images"] == 4
    assert "rfid" not in metrics
    assert metrics["protocol"]["data"]["resize"] == "shorter side to 32"
    assert main(["evaluate", *tokenizer, "--data", str(pictures), "--out", str(out), "--no-rfid", "--no-gaussian", "--workers", "0"]) == 0
    without, whole = json.loads(out.read_text()), set(metrics)
    assert whole - set(without) == {name for name in whole if name.startswith("gaussian_")} != set()
    assert without["psnr"] == metrics["psnr"]


def test_validate_test_predict(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "METRICS", [metric for metric in reconstruction.METRICS if not metric.costly])
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    limits = ["--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=2", "--data.init_args.batch_size=5"]
    for command in ("validate", "test", "predict"):
        assert main([command, *SMOKE, *limits, f"--runs={tmp_path}", "--name=again", checkpoint]) == 0
    files = sorted((tmp_path / "again/tokens").rglob("*.tokens"))
    assert len(files) == 10


@pytest.mark.slow
def test_resumed_run_continues_the_multipliers(tmp_path: Path) -> None:
    def fit(name: str, steps: int, *more: str) -> dict[str, torch.Tensor]:
        arguments = [*FIT, f"--runs={tmp_path}", f"--name={name}", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=1", *more]
        assert main([*arguments, "--trainer.log_every_n_steps=1"]) == 0
        return torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    first = fit("stopped", 10)
    last = fit("stopped", 20, "--ckpt_path=last")
    for name in ("lambda_min", "lambda_mean", "lambda_max"):
        key = f"tokenizer.quantizer.tdc.{name}"
        # the trajectory itself: every logged value is one factor away from the one before, across the interruption
        events = EventAccumulator(str(tmp_path / "stopped")).Reload()
        values = {event.step: event.value for event in events.Scalars(f"tdc/{name}")}
        assert sorted(values) == list(range(20))
        assert values[9] == first[key].item()
        assert values[19] == last[key].item()
        ratios = [abs(np.log(values[step + 1] / values[step]) / np.log(1.01)) for step in range(19)]
        np.testing.assert_allclose(ratios, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.init_args.image_size=36"], ["36", "multiple", "8"]),
        (["--model.quantizer.init_args.bits_per_position=13"], ["bits_per_position", "13"]),
        (["--model.quantizer.init_args.bits_per_position=24"], ["latent_channels", "3"]),
        (["--data=gq_lightning.data.ImageNet", "--data.init_args.root=/nowhere"], ["/nowhere", "data.root"]),
        (["--data=gq_lightning.data.ImageFolder", "--data.init_args.root={empty}"], ["{empty}", "no pictures"]),
        (["--model.schedule=cosine", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"], ["model.schedule", "max_steps"]),
        (["--ckpt_path=/nowhere.ckpt"], ["/nowhere.ckpt"]),
    ],
)
def test_wrong_input_gives_one_line(arguments: list[str], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    arguments, words = ([text.replace("{empty}", str(tmp_path / "empty")) for text in texts] for texts in (arguments, words))
    assert main([*FIT, f"--runs={tmp_path}", *arguments]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    for word in words:
        assert word in error[0]


def test_parsing_errors_are_one_line_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "typo.yaml").write_text("model:\n  learning_rat: 1\n")
    for arguments, word in (
        (["--config", str(tmp_path / "typo.yaml")], "learning_rat"),
        (["--config", str(tmp_path / "nowhere.yaml")], "nowhere.yaml"),
        (["--model.quantizer.init_args.bits_per_position=x"], "bits_per_position"),
        (["--data=Nothing"], "Nothing"),
    ):
        assert main([*FIT, *arguments]) == 2
        errors = capfd.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        assert word in errors[0]
    assert main(["frobnicate"]) == 2
    assert "frobnicate is not a command" in capfd.readouterr().err


def test_a_run_is_not_overwritten_by_accident(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.json").read_bytes()
    assert main([*FIT, f"--runs={run.parent}", "--name=smoke"]) == 2
    assert "--overwrite true" in capfd.readouterr().err
    assert (run / "metrics.json").read_bytes() == before


def test_no_last_checkpoint_is_no_weights_to_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`fit` begins instead, see test_ends."""
    assert main(["validate", *SMOKE, f"--runs={tmp_path}", "--name=none", "--ckpt_path=last"]) == 2
    line = f"error: {tmp_path}/none/checkpoints/last.ckpt: no such checkpoint: give --ckpt_path last, best or a file: "
    assert capfd.readouterr().err.splitlines()[-1].startswith(line)


def test_broken_pictures_stop_evaluation_unless_skipped(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    call = ["evaluate", "--tokenizer", str(run / "tokenizer"), "--data", str(tmp_path), "--out", str(tmp_path / "m.json"), "--no-rfid"]
    for workers in ("0", "1"):
        assert main([*call, "--workers", workers]) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "bad.png" in error
    assert main([*call, "--skip-broken", "--workers", "0"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["images"] == 1


def test_tools_name_the_missing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for call in (
        ["convert", str(tmp_path), "--out", str(tmp_path / "out")],
        ["convert", str(tmp_path / "no.ckpt"), "--out", str(tmp_path / "out")],
        ["encode", "--tokenizer", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "out")],
    ):
        assert main(call) == 2
        assert str(tmp_path) in capfd.readouterr().err
    (tmp_path / "no.ckpt").write_bytes(b"something else")
    assert main(["convert", str(tmp_path / "no.ckpt"), "--out", str(tmp_path / "out")]) == 2
    assert "not a checkpoint" in capfd.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "weights", "shard", "convert", "encode", "decode", "evaluate"):
        assert f"\n  {command} " in text
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert "usage:" in capsys.readouterr().out


def test_missing_weights_name_the_command(run: Path, tmp_path: Path) -> None:
    """In a process of its own, since networks are kept for the life of one."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.png")
    call = ["evaluate", "--tokenizer", str(run / "tokenizer"), "--data", str(tmp_path), "--out", str(tmp_path / "m.json"), "--workers", "0"]
    environment = {**os.environ, "GQ_LIGHTNING_HOME": str(tmp_path / "empty"), "GQ_LIGHTNING_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "gq_lightning", *call], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "python -m gq_lightning weights" in error
    assert str(tmp_path / "empty") in error


@pytest.mark.parametrize("backbone", ["vit_small", pytest.param("unet_small", marks=pytest.mark.slow)])
def test_bfloat16_and_plain_gaussian_vae(backbone: str, tmp_path: Path) -> None:
    """Mixed precision trains both backbones; fixed multipliers stay 1."""
    small = ["--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"] if backbone == "vit_small" else []
    arguments = [argument for argument in SMOKE if "init_args.width" not in argument and "init_args.layers" not in argument]
    arguments += [
        "--config",
        str(CONFIGS / f"backbone/{backbone}.yaml"),
        *small,
        "--model.quantizer.init_args.tdc_variant=fixed",
    ]
    arguments += [
        "--export.rfid=false",
        "--trainer.max_steps=3",
        "--trainer.precision=bf16-mixed",
        "--data.init_args.batch_size=4",
    ]
    assert main(["fit", *arguments, f"--runs={tmp_path}", "--name=vae"]) == 0
    state = ImageTokenizer.from_pretrained(tmp_path / "vae/tokenizer").state_dict()
    assert [state[f"quantizer.tdc.lambda_{name}"].item() for name in ("min", "mean", "max")] == [1, 1, 1]
    assert json.loads((tmp_path / "vae/metrics.json").read_text())["psnr"] > 0

"""Every shipped config parses and builds, at the sizes it ships with, on the meta device."""

import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small import CONFIGS

from gq_lightning.cli.training import CommandLine

# those of priors are built by tests/priors
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if "TokenSets" not in path.read_text())
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.logger=false"]
SMALL = ("backbone/vit_small.yaml", "backbone/unet_small.yaml")


def build(tmp_path: Path, *files: str, arguments: tuple[str, ...] = ()) -> CommandLine:
    configs = [text for file in files for text in ("--config", str(CONFIGS / file))]
    root = ["--data.init_args.root=/data"] if "root:" in (CONFIGS / files[-1]).read_text() else []
    with torch.device("meta"):
        return CommandLine([*configs, *HERE, *root, f"--runs={tmp_path}", *arguments], run=False)


@pytest.mark.parametrize("file", FILES)
def test_every_file_alone_or_over_the_base(file: str, tmp_path: Path) -> None:
    cli = build(tmp_path, *([file] if file in ("base.yaml", "demo.yaml") else ["base.yaml", file]))
    assert cli.model.tokenizer.quantizer.bits_per_position == 16


METHODS = sorted(path.stem for path in (CONFIGS / "quantizer").iterdir())


@pytest.mark.parametrize("rate", [16, 32, 64])
@pytest.mark.parametrize("quantizer", METHODS)
@pytest.mark.parametrize(("backbone", "parameters"), [("unet", 86_974_627), ("vit", 174_825_440)])
def test_the_papers_models(backbone: str, parameters: int, quantizer: str, rate: int, tmp_path: Path) -> None:
    """Both backbones under every method at every rate; what the method decides are a few widths."""
    files = ("base.yaml", f"backbone/{backbone}.yaml", f"quantizer/{quantizer}.yaml", "scale/paper.yaml", "machine/node8.yaml")
    model = build(tmp_path, *files, arguments=(f"--model.quantizer.init_args.bits_per_position={rate}",)).model
    count = sum(parameter.numel() for parameter in model.tokenizer.backbone.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
    assert model.tokenizer.quantizer.bits_per_position == rate
    assert model.tokenizer.backbone.latent_channels == model.tokenizer.quantizer.latent_channels
    if quantizer in ("gq", "gq_exact", "gaussian", "tokenbridge", "tokenbridge_tdc"):
        assert (count, model.tokenizer.quantizer.latent_channels) == (parameters, 16), "the paper's"


def test_the_papers_recipe(tmp_path: Path) -> None:
    rates = {"gq": 1e-4, "fsq": 1e-4, "vq": 4e-4, "lfq": 4e-5, "bsq": 4e-5}
    for quantizer, rate in rates.items():
        cli = build(tmp_path, "base.yaml", f"quantizer/{quantizer}.yaml", "scale/paper.yaml", "machine/node8.yaml")
        model = cli.model
        assert model.learning_rate == rate
        assert model.betas == model.adversary.betas == (0.9, 0.999)
        assert cli.datamodule.training_crop.cut == "center"
        assert (model.adversary.weight, model.adversary.start, model.adversary.discriminator.layers) == (0.75, 10_000, 6)
        assert (model.loss.pixel, model.loss.lpips_weight, model.loss.lpips.network) == ("l1", 1.0, "vgg")


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("scale", ["demo.yaml", "scale/cpu.yaml", "scale/hour_cpu.yaml", "scale/hour_gpu.yaml", "scale/smoke.yaml"])
def test_small_models_at_all_scales(backbone: str, scale: str, tmp_path: Path) -> None:
    files = ("demo.yaml", backbone) if scale == "demo.yaml" else ("base.yaml", backbone, "data/photographs.yaml", scale)
    cli = build(tmp_path, *files)
    size = cli.datamodule.image_size
    images = torch.empty(2, 3, size, size, device="meta")
    assert cli.model.tokenizer.backbone.encode(images).shape == (2, cli.model.tokenizer.quantizer.encoder_channels, size // 8, size // 8)


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the batch script hands to srun can be parsed; and so can what the config says of another signal."""
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    script, paper = str(CONFIGS / "machine/slurm.sbatch"), str(CONFIGS / "scale/paper.yaml")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    call = ["bash", script, "--config", paper, "--data.init_args.root", "/my data"]
    words = subprocess.run(call, check=True, capture_output=True, text=True, env=environment, timeout=20).stdout.splitlines()
    assert words[:5] == ["--kill-on-bad-exit=1", ".venv/bin/python", "-m", "gq_lightning", "fit"]
    at = words.index("--ckpt_path")
    assert words[at + 1] == "last"
    monkeypatch.chdir(CONFIGS.parent)
    with torch.device("meta"):
        cli = CommandLine([*words[5:at], *words[at + 2 :], *HERE, f"--runs={tmp_path}"], run=False)
    assert str(cli.datamodule.root) == "/my data"
    assert cli.trainer.strategy._timeout == timedelta(minutes=10)
    text = (CONFIGS / "machine/slurm.yaml").read_text()
    begin = text.index("  # plugins:")
    other = tmp_path / "slurm.yaml"
    other.write_text(text[:begin] + text[begin:].replace("  # ", "  "))
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 7}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    environment = build(tmp_path, "base.yaml", arguments=("--config", str(other), *HERE, "--data.init_args.root=/data")).trainer.strategy
    assert environment.cluster_environment.requeue_signal == signal.SIGUSR2  # type: ignore[attr-defined]


def test_the_demo_with_a_small_unet(tmp_path: Path) -> None:
    model = build(tmp_path, "demo.yaml", "demo_unet.yaml").model
    assert type(model.tokenizer.backbone).__name__ == "UNet"
    assert (model.tokenizer.quantizer.latent_channels, model.tokenizer.quantizer.tdc) == (8, None)
    # what the overlay does not name is the demo's
    assert (model.loss.lpips_weight, model.betas, model.schedule) == (0.02, (0.9, 0.99), "cosine")


def test_width_and_image_size_are_typed_once(tmp_path: Path) -> None:
    more = ("--model.quantizer.init_args.latent_channels=8", "--data.init_args.image_size=128")
    model = build(tmp_path, "base.yaml", "backbone/vit.yaml", arguments=more).model
    backbone = model.tokenizer.backbone
    assert (backbone.encoder_channels, backbone.latent_channels, backbone.fixed_image_size) == (16, 8, 128)
    for file in FILES:
        text = (CONFIGS / file).read_text()
        assert "encoder_channels" not in text
        assert text.count("latent_channels") + text.count("image_size") <= 2

"""Every shipped config parses and builds, at the sizes it ships with, on the meta device."""

from pathlib import Path

import pytest
import torch
from small import CONFIGS

from gq_lightning.cli import CommandLine

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
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
    assert cli.model.quantizer.bits_per_position == 16


METHODS = sorted(path.stem for path in (CONFIGS / "quantizer").iterdir())


@pytest.mark.parametrize("rate", [16, 32, 64])
@pytest.mark.parametrize("quantizer", METHODS)
@pytest.mark.parametrize(("backbone", "parameters"), [("unet", 86_974_627), ("vit", 174_825_440)])
def test_the_papers_models(backbone: str, parameters: int, quantizer: str, rate: int, tmp_path: Path) -> None:
    """Both backbones under every method at every rate; what the method decides are a few widths."""
    files = ("base.yaml", f"backbone/{backbone}.yaml", f"quantizer/{quantizer}.yaml", "scale/paper.yaml", "machine/node8.yaml")
    model = build(tmp_path, *files, arguments=(f"--model.quantizer.init_args.bits_per_position={rate}",)).model
    count = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
    assert model.quantizer.bits_per_position == rate
    assert model.backbone.latent_channels == model.quantizer.latent_channels
    if quantizer in ("gq", "gaussian", "tokenbridge", "tokenbridge_tdc"):
        assert (count, model.quantizer.latent_channels) == (parameters, 16), "the paper's"
    text = (CONFIGS / f"quantizer/{quantizer}.yaml").read_text()
    assert ("callbacks.TDC" in text) == (quantizer in ("gq", "tokenbridge_tdc"))
    assert ("callbacks.GaussianQuant" in text) == (quantizer in ("gq", "gaussian", "tokenbridge", "tokenbridge_tdc"))


def test_the_papers_recipe(tmp_path: Path) -> None:
    rates = {"gq": 1e-4, "fsq": 1e-4, "vq": 4e-4, "lfq": 4e-5, "bsq": 4e-5}
    for quantizer, rate in rates.items():
        model = build(tmp_path, "base.yaml", f"quantizer/{quantizer}.yaml", "scale/paper.yaml", "machine/node8.yaml").model
        assert model.learning_rate == rate
        assert (model.adversary.weight, model.adversary.start, model.adversary.discriminator.layers) == (0.75, 10_000, 6)
        assert (model.loss.pixel, model.loss.lpips_weight, model.loss.lpips.network) == ("l1", 1.0, "vgg")


@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("scale", ["demo.yaml", "scale/cpu.yaml", "scale/smoke.yaml"])
def test_small_models_at_all_scales(backbone: str, scale: str, tmp_path: Path) -> None:
    files = ("demo.yaml", backbone) if scale == "demo.yaml" else ("base.yaml", backbone, "data/photographs.yaml", scale)
    cli = build(tmp_path, *files)
    size = cli.datamodule.image_size
    images = torch.empty(2, 3, size, size, device="meta")
    assert cli.model.backbone.encode(images).shape == (2, cli.model.quantizer.encoder_channels, size // 8, size // 8)


def test_the_demo_with_a_small_unet(tmp_path: Path) -> None:
    model = build(tmp_path, "demo.yaml", "demo_unet.yaml").model
    assert type(model.backbone).__name__ == "UNet"
    assert (model.quantizer.latent_channels, model.quantizer.log_variance, model.quantizer.tdc.beta) == (3, -7.0, 1.02)
    # what the overlay does not name is the demo's
    assert (model.loss.lpips_weight, model.betas, model.schedule) == (0.02, (0.9, 0.99), "cosine")


def test_width_and_image_size_are_typed_once(tmp_path: Path) -> None:
    more = ("--model.quantizer.init_args.latent_channels=8", "--data.init_args.image_size=128")
    model = build(tmp_path, "base.yaml", "backbone/vit.yaml", arguments=more).model
    assert (model.backbone.encoder_channels, model.backbone.latent_channels, model.backbone.window) == (16, 8, 128)
    for file in FILES:
        text = (CONFIGS / file).read_text()
        assert "encoder_channels" not in text
        assert text.count("latent_channels") + text.count("image_size") <= 2

"""Autoencoders of diffusers: the same function as theirs, converted, fine-tuned and measured; what does not fit is refused by its field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CONFIGS
from torch import Tensor

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.backbones import DiffusersKL, DiffusersTiny
from gq_lightning.cli.main import main
from gq_lightning.data import Photographs
from gq_lightning.importers.diffusers import convert, even_groups, load_backbone
from gq_lightning.quantizers import FiniteScalarQuantizer
from killed import write_pictures

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}


def kl(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**(SMALL | LEVELS | arguments)).eval()


def tiny() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(**TINY, scaling_factor=0.9).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "arguments",
    [{}, {"scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}],
    ids=["sd", "flux"],
)
@torch.no_grad()
def test_it_is_their_kl_autoencoder(arguments: dict[str, Any], tmp_path: Path, images: Tensor) -> None:
    model = kl(**arguments)
    backbone, scaling, shift = load_backbone(saved(model, tmp_path)), model.config.scaling_factor, model.config.shift_factor or 0.0
    assert isinstance(backbone, DiffusersKL) and backbone.downsampling == 4
    theirs, (mean, log_variance) = model.encode(images).latent_dist, backbone.encode(images).chunk(2, dim=1)
    torch.testing.assert_close(mean, (theirs.mean - shift) * scaling)
    torch.testing.assert_close((log_variance / 2).exp(), theirs.std * scaling)
    latents = torch.randn_like(mean)
    torch.testing.assert_close(backbone.decode(latents), model.decode(latents / scaling + shift).sample)


@torch.no_grad()
def test_it_is_their_tiny_autoencoder_with_a_log_variance(tmp_path: Path, images: Tensor) -> None:
    model = tiny()
    backbone = load_backbone(saved(model, tmp_path))
    assert isinstance(backbone, DiffusersTiny) and backbone.downsampling == 8
    mean, log_variance = backbone.encode(images.narrow(3, 0, 32)).chunk(2, dim=1)
    torch.testing.assert_close(mean, model.encode(images.narrow(3, 0, 32)).latents * 0.9)
    assert torch.allclose(log_variance, torch.tensor(0.9).log() * 2)
    latents = torch.randn_like(mean)
    torch.testing.assert_close(backbone.decode(latents), model.decode(latents / 0.9).sample)


def test_features_are_what_the_quantizer_takes(images: Tensor) -> None:
    quantizer = FiniteScalarQuantizer(16, levels=[16] * 4)
    for backbone in (
        DiffusersKL(4, 4, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=8),
        DiffusersTiny(4, 4, block_out_channels=[8, 8], blocks=[1, 1]),
    ):
        assert ImageTokenizer(backbone, quantizer).encode(images).shape == (2, 16, 24, 1)
        with pytest.raises(UserError, match=r"encoder_channels 12 are neither latent_channels, 4"):
            type(backbone)(12, 4)


@pytest.mark.parametrize("make", [kl, tiny])
@torch.no_grad()
def test_another_order_of_channels_is_the_same_network(make: Any, tmp_path: Path, images: Tensor) -> None:
    images, order = images.narrow(3, 0, 32), [2, 0, 3, 1]
    backbone = load_backbone(saved(make(), tmp_path))
    mean, log_variance = backbone.encode(images).chunk(2, dim=1)
    decoded = backbone.decode(mean)
    backbone.reorder(order)
    torch.testing.assert_close(backbone.encode(images), torch.cat([mean[:, order], log_variance[:, order]], dim=1))
    torch.testing.assert_close(backbone.decode(mean[:, order]), decoded)


def test_groups_cost_about_the_same() -> None:
    bits = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])
    order = even_groups(bits, 3)
    assert sorted(order) == list(range(6))
    assert bits[order].view(3, 2).sum(1).tolist() == [10.0, 10.0, 10.0]


def trained(folder: Path) -> Path:
    """A KL autoencoder after 60 steps on photographs, whose posteriors cost some 20 bits a position."""
    model, pictures = kl(scaling_factor=1.0), Photographs(32, workers=0).training_set()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
    for _ in range(60):
        batch = torch.stack([pictures[0] for _ in range(8)])
        posterior = model.encode(batch).latent_dist
        loss = 100 * (model.decode(posterior.sample()).sample - batch).square().mean() + 0.01 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return saved(model.eval(), folder)


def test_a_trained_one_is_converted_fine_tuned_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = write_pictures(tmp_path / "pictures")
    trained(tmp_path / "pipeline/vae")  # as pipelines have it
    size = ["--codebook_size", "256"]
    assert (
        main(["convert", "--from-diffusers", "pipeline", "--bits", "16", "--out", "converted", *size, "--data", str(pictures / "val")]) == 0
    )
    printed, report = capfd.readouterr().out, json.loads(Path("converted/conversion.json").read_text())
    assert f"PSNR {report['psnr_of_tokens']:.2f} dB from tokens" in printed
    assert len(report["groups"]) == 2 and sorted(channel for group in report["groups"] for channel in group["channels"]) == [0, 1, 2, 3]
    assert report["lost_decibels"] == pytest.approx(report["psnr_of_posterior_mean"] - report["psnr_of_tokens"], abs=0.011)
    converted = ImageTokenizer.from_pretrained("converted")
    assert converted.quantizer.posterior(torch.zeros(1, 8)).bits.numel() == 2  # type: ignore[operator]
    files = [word for name in ("base", "data/folder", "scale/smoke", "machine/cpu") for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    data = [
        f"--data.init_args.{name}" for name in (f"root={pictures}/train", f"validation_root={pictures}/val", "batch_size=4", "workers=0")
    ]
    few = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--export.rfid=false"]
    assert (
        main(["fit", *files, *data, *few, "--init_from=converted", "--export.columns=2", "--name=tuned", "--model.loss.lpips_weight=0"])
        == 0
    )
    tuned = ImageTokenizer.from_pretrained("runs/tuned")
    assert tuned.fingerprint != converted.fingerprint and tuned.backbone.identity() == converted.backbone.identity()
    assert json.loads(Path("runs/tuned/metrics.json").read_text())["psnr"] > 5


def test_a_posterior_of_far_more_bits_is_said_to_need_training(tmp_path: Path) -> None:
    """As Stable Diffusion's: means of unit scale with a deviation of 2^-15 or so, 15 bits a channel where a codeword has 4."""
    model = kl(scaling_factor=1.0)
    with torch.no_grad():
        model.quant_conv.weight[4:].zero_()
        model.quant_conv.bias[4:] = -2 * 15 * torch.tensor(2.0).log()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    _, report = convert(saved(model, tmp_path), images, 16, codebook_size=16)
    assert report["fine_tune"] and report["share_above"] == 1.0
    assert report["posterior_bits_per_position"] == pytest.approx(4 * 14.3, abs=4)
    # a model without log-variances begins at the bits that it has
    _, report = convert(saved(tiny(), tmp_path / "tiny"), images, 16, codebook_size=256)
    assert report["posterior_bits_per_position"] == pytest.approx(16, abs=4)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_does_not_fit_is_refused_by_its_field(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            load_backbone(folder)
        return str(error.value)

    folder = saved(kl(), tmp_path / "kl")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    for fields, said in (
        ({"_class_name": "UNet2DModel"}, "_class_name 'UNet2DModel' is neither AutoencoderKL nor AutoencoderTiny"),
        ({"in_channels": 4}, "its weights cannot be loaded"),
        ({"latents_mean": [0.0] * 4}, "latents_mean [0.0, 0.0, 0.0, 0.0] is not supported"),
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported, only 'silu'"),
        ({"block_out_channels": [8, 16, 24]}, "its weights cannot be loaded"),
    ):
        saved(kl(), folder)
        change(folder, **fields)
        assert said in refused(folder)
    saved(kl(), folder)
    for wrong, said in (
        ({name: value for name, value in weights.items() if name != "quant_conv.bias"}, "do not fit its config, quant_conv.bias"),
        (weights | {"quant_conv.bias": torch.full((8,), torch.nan)}, "quant_conv.bias holds values that are not finite"),
    ):
        save_file(wrong, folder / "diffusion_pytorch_model.safetensors")
        assert said in refused(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert "give a model saved in safetensors" in refused(folder)
    assert "no model of diffusers" in refused(tmp_path)
    saved(kl(), folder)
    for arguments, said in (
        (["--from-diffusers", str(folder)], "give SOURCE, or --from_diffusers with --bits"),
        ([str(folder), "--data", str(folder)], "give SOURCE, or --from_diffusers with --bits"),
        ([str(folder), "--from-diffusers", str(folder), "--bits", "16"], "give SOURCE, or --from_diffusers with --bits"),
        (["--from-diffusers", str(folder), "--bits", "48"], "--bits 48: "),
        (["--from-diffusers", str(tmp_path / "nowhere"), "--bits", "16"], "no model of diffusers"),
    ):
        assert main(["convert", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()

"""`summary` against parameters and FLOPs counted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, small_tokenizer
from torch import Tensor, nn

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.backbones import UNet
from gq_lightning.backbones.base import Backbone
from gq_lightning.backbones.unet import Attention
from gq_lightning.cli.main import main
from gq_lightning.evaluation.summary import render, summarize
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.quantizers.base import Quantized, Quantizer
from gq_lightning.training.module import TokenizerTraining

BASE = ["--config", str(CONFIGS / "base.yaml")]


class TinyBackbone(Backbone):
    """One convolution there, a linear layer back, and attention between positions in front of it."""

    fixed_image_size = None

    def __init__(self) -> None:
        super().__init__()
        self.encoder_channels, self.latent_channels, self.downsampling = 6, 4, 8
        self.encoder = nn.Conv2d(3, 6, 8, stride=8)
        self.decoder = nn.Linear(4, 3 * 64, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        sequence = latents.flatten(2).transpose(1, 2).unsqueeze(1)
        pixels = self.decoder(F.scaled_dot_product_attention(sequence, sequence, sequence).squeeze(1))
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, latents.shape[-2:]), 8)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight  # type: ignore[return-value]


class TinyQuantizer(Quantizer):
    """A learned codebook without any method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_channels, self.latent_channels = 6, 4
        self.codebook_size, self.tokens_per_position, self.bits_per_position = 8, 2, 6.0
        self.codebook = nn.Parameter(torch.zeros(8, 2))

    def forward(self, features: Tensor) -> Quantized:
        raise AssertionError("a summary computes no codes")

    tokenize = detokenize = forward  # type: ignore[assignment]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tiny_model_by_hand(device: str) -> None:
    with torch.device(device):
        training = TokenizerTraining(TinyBackbone(), TinyQuantizer())
        training.critic = nn.Linear(10, 1)
    summary = summarize(training.tokenizer, 32, training)
    assert summary.parameters == {"encoder": 6 * 3 * 64 + 6, "decoder": 4 * 192, "quantizer": 16, "total": 1158 + 768 + 16}
    assert summary.training_only == {"critic": 11}
    positions = 4 * 4
    assert summary.encode_flops == 2 * positions * 6 * (3 * 8 * 8)
    assert summary.decode_flops == 2 * positions * 4 * 192 + 2 * (2 * positions**2 * 4)
    assert (summary.tokens_per_position, summary.codebook_size, summary.tokens_per_image) == (2, 8, 32)
    assert (summary.bits_per_position, summary.bits_per_pixel) == (6.0, 6 / 64)


def test_unet_layer_by_layer() -> None:
    """Every convolution and attention of a real forward pass, each by its own formula."""
    backbone = UNet(32, 16, 64, channels=32, multipliers=[1, 2, 2, 2], blocks=1, attention_resolutions=[8, 16], norm_groups=8)
    flops = 0

    def convolution(layer: nn.Conv2d, inputs: Any, output: Tensor) -> None:
        nonlocal flops
        flops += 2 * output.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]

    def attention(layer: Attention, inputs: Any, output: Tensor) -> None:
        nonlocal flops
        _, channels, height, width = output.shape
        flops += 2 * 2 * (height * width) ** 2 * channels

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        if isinstance(module, Attention):
            module.register_forward_hook(attention)
    with torch.no_grad():
        backbone.encode(torch.zeros(1, 3, 64, 64))
        encode, flops = flops, 0
        backbone.decode(torch.zeros(1, 16, 8, 8))
    with torch.device("meta"):
        again = UNet(32, 16, 64, channels=32, multipliers=[1, 2, 2, 2], blocks=1, attention_resolutions=[8, 16], norm_groups=8)
        summary = summarize(ImageTokenizer(again, GaussianQuantizer(latent_channels=16)), 64)
    assert (summary.encode_flops, summary.decode_flops) == (encode, flops)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["summary", *arguments, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_papers_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine with nothing: no data, no LPIPS weights and no way to fetch them; and it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gq_lightning.losses.reconstruction.LPIPS", None)
    files = ["backbone/vit", "scale/paper", "machine/node8"]
    found = run(capsys, *BASE, *(text for file in files for text in ("--config", str(CONFIGS / f"{file}.yaml"))))
    assert found["parameters"]["total"] == 174_825_440
    n, width = 1024, 768
    block = 2 * n * 12 * width**2 + 2 * 2 * n**2 * width
    assert found["encode_flops"] == 12 * block + 2 * n * (192 * width + width * 32)
    assert found["decode_flops"] == 12 * block + 2 * n * (16 * width + width * 3072 + 3072 * 192)
    assert not list(tmp_path.iterdir())


def test_the_papers_unet(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, *BASE, "--model.quantizer.init_args.bits_per_position=64")
    assert found["parameters"] == {"encoder": 35_325_856, "decoder": 51_648_771, "quantizer": 0, "total": 86_974_627}
    assert (found["tokens_per_position"], found["tokens_per_image"], found["bits_per_pixel"]) == (4, 4096, 1.0)


@pytest.mark.parametrize("quantizer", sorted(path.name for path in (CONFIGS / "quantizer").glob("*.yaml")))
def test_every_quantizer(quantizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--config", str(CONFIGS / "backbone/unet_small.yaml"), "--data.init_args.image_size=64"]
    found = run(capsys, *BASE, *small, "--config", str(CONFIGS / "quantizer" / quantizer))
    assert found["bits_per_position"] == 16
    assert found["tokens_per_image"] == 64 * found["tokens_per_position"]


def test_the_config_that_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ["--config", str(CONFIGS / "demo.yaml"), "--model.loss.lpips_weight=0"]
    with pytest.raises(SystemExit):
        main(["fit", *demo, "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert run(capsys, "--config", str(tmp_path / "config.yaml")) == run(capsys, *demo)


def test_forms() -> None:
    summary = summarize(small_tokenizer("vit"), 32)
    header, rule, row = str(render(summary, "markdown")).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith("| VisionTransformer | GaussianQuantizer | 0.0")
    table = render(summary)
    assert not isinstance(table, str)
    assert [column.header for column in table.columns][2] == "exactly"
    assert f"{summary.parameters['total']:,}" in list(table.columns[2].cells)


def test_sizes_that_the_backbone_refuses() -> None:
    with pytest.raises(UserError, match="64x64"):
        summarize(small_tokenizer("vit"), 64)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([*BASE, "--model.quantizer.init_args.bits_per_position=13"], "bits_per_position"),
        ([*BASE, "--data.init_args.image_size=36"], "36"),
        ([*BASE, "--model.teaching_rate=1"], "teaching_rate"),
        ([*BASE, "--format=xml"], "xml"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--config", str(CONFIGS / "backbone/vit.yaml")], "quantizer"),
    ],
)
def test_wrong_input_gives_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err

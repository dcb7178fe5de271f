"""Exported graphs give what the tokenizer gives, in other batches and sizes, without this package; what cannot be exported is named."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from small import CONFIGS, small_tokenizer
from test_methods import quantizers
from torch import Tensor

from gq_lightning import ImageTokenizer
from gq_lightning.backbones import UNet, VisionTransformer
from gq_lightning.cli.main import main
from gq_lightning.errors import UserError
from gq_lightning.quantizers import GaussianQuantizer, LookupFreeQuantizer
from gq_lightning.tokenizer import exporting
from gq_lightning.tokenizer.exporting import FACTS, SUFFIX, Format, export_tokenizer

DOCS = Path(__file__).parents[1] / "docs/export.md"


def tiny_unet() -> ImageTokenizer:
    torch.manual_seed(0)
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256)
    widths = {"encoder_channels": 8, "latent_channels": 4, "image_size": 16}
    network = UNet(**widths, channels=8, multipliers=[1], blocks=1, attention_resolutions=[], norm_groups=4, pixel_unshuffle=2)
    return ImageTokenizer(network, quantizer).eval().requires_grad_(False)


def run(path: Path, value: Tensor) -> Tensor:
    """A file's graph, as its user would run it."""
    if path.suffix == SUFFIX["torch"]:
        return torch.export.load(path).module()(value)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def check(tokenizer: ImageTokenizer, folder: Path, format: Format, images: Tensor) -> None:
    tokens = tokenizer.encode(images)
    assert (run(folder / f"encoder{SUFFIX[format]}", images) == tokens).float().mean() >= 0.999  # but for ties
    decoded = run(folder / f"decoder{SUFFIX[format]}", tokens)
    torch.testing.assert_close(decoded, tokenizer.decode(tokens), rtol=0, atol=1e-4)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTokenizer, Path]:
    tokenizer, folder = tiny_unet(), tmp_path_factory.mktemp("unet") / "exported"
    export_tokenizer(tokenizer, "onnx", folder)
    return tokenizer, folder


def test_a_unet_s_batch_and_size_are_free(exported: tuple[ImageTokenizer, Path]) -> None:
    tokenizer, folder = exported
    for shape in ((1, 3, 4, 4), (2, 3, 16, 20), (5, 3, 60, 14)):
        check(tokenizer, folder, "onnx", noise(*shape))
    facts = json.loads((folder / FACTS).read_text())
    assert facts == {**tokenizer.facts(), "fixed_image_size": None}


def test_the_lines_of_the_docs_run(exported: tuple[ImageTokenizer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, folder = exported
    monkeypatch.chdir(folder.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 20
    assert not re.search(r"torch|gq_lightning", code.replace("gq_lightning export", ""))
    found: dict[str, Any] = {}
    exec(code, found)
    assert main(["encode", "photo.png", f"--tokenizer={save(tokenizer, folder)}", "--out=ours"]) == 0
    assert main(["decode", "ours/photo.png.tokens", f"--tokenizer={folder.parent / 'saved'}", "--out=ours"]) == 0
    with Image.open("decoded.png") as theirs, Image.open("ours/photo.png") as ours:
        difference = np.abs(np.asarray(theirs).astype(int) - np.asarray(ours))
    assert theirs.size == (50, 37)
    assert (difference <= 1).mean() > 0.99  # a tie moves one position's pixels


def save(tokenizer: ImageTokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder.parent / "saved")
    return folder.parent / "saved"


@pytest.mark.slow
def test_a_vit_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_tokenizer("vit").eval().requires_grad_(False)
    tokenizer.save_pretrained(tmp_path / "vit")
    assert main(["export", f"--tokenizer={tmp_path / 'vit'}", f"--out={tmp_path}", "--format=torch"]) == 0
    assert "tokens are those of the tokenizer" in capsys.readouterr().out
    check(tokenizer, tmp_path, "torch", noise(3, 3, 32, 32))
    for half in ("encoder", "decoder"):  # torch alone can load it
        program = torch.export.load(tmp_path / f"{half}.pt2")
        modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
        targets = {str(node.target) for module in modules for node in module.graph.nodes if node.op == "call_function"}
        assert targets and not any("gq_lightning" in target for target in targets)


class _Looks(LookupFreeQuantizer):
    def tokenize(self, features: Tensor) -> Tensor:
        return super().tokenize(-features if float(features.sum()) > 0 else features)


class _LooksVit(VisionTransformer):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents * float(latents.abs().max()))


def vit(kind: type[VisionTransformer], quantizer: Any) -> ImageTokenizer:
    widths = {"encoder_channels": quantizer.encoder_channels, "latent_channels": quantizer.latent_channels, "image_size": 16}
    return ImageTokenizer(kind(**widths, width=16, layers=1, heads=1, head_width=16), quantizer).eval().requires_grad_(False)


@pytest.mark.parametrize("part", ["_Looks", "_LooksVit"])
def test_what_cannot_be_exported_is_named(part: str, tmp_path: Path) -> None:
    kind, quantizer = (_LooksVit, LookupFreeQuantizer(16)) if part == "_LooksVit" else (VisionTransformer, _Looks(16))
    with pytest.raises(UserError, match=f"export: {part} cannot be exported to torch"):
        export_tokenizer(vit(kind, quantizer), "torch", tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision_and_a_missing_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = vit(VisionTransformer, LookupFreeQuantizer(16))
    with pytest.raises(UserError, match="float16"):
        export_tokenizer(tokenizer.half(), "torch", tmp_path)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'gq_lightning\[onnx\]'"):
        export_tokenizer(tokenizer.float(), "onnx", tmp_path)


def test_a_tie_is_none_but_where_rounding_decides() -> None:
    tokenizer = vit(VisionTransformer, LookupFreeQuantizer(16, codebook_size=65536))
    last = tokenizer.backbone.encoder.linear_out
    last.weight.data.zero_()
    last.bias.data.fill_(1.0)
    last.bias.data[0] = 1e-7  # the sign of the first channel, the highest bit, is a matter of rounding; those of the others are not
    compared = exporting._compare(tokenizer, lambda images: tokenizer.encode(images) ^ 2**15, tokenizer.decode)
    assert compared.ties == compared.tokens == 4 * 4
    with pytest.raises(UserError, match="16 of 16|4 of 4|12 of 12"):
        exporting._compare(tokenizer, lambda images: tokenizer.encode(images) ^ 2**14, tokenizer.decode)
    with pytest.raises(UserError, match=r"decoded pictures lie 0\.001"):
        exporting._compare(tokenizer, tokenizer.encode, lambda tokens: tokenizer.decode(tokens) + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_box(format: Format, tmp_path: Path) -> None:
    assert main(["export", "--tokenizer=gq-small-16", f"--out={tmp_path}", f"--format={format}"]) == 0
    check(ImageTokenizer.from_pretrained("gq-small-16"), tmp_path, format, noise(2, 3, 120, 88))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "unet"])
@pytest.mark.parametrize("method", quantizers())
def test_every_method(method: str, backbone: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(backbone, quantizers()[method]).eval().requires_grad_(False)
    export_tokenizer(tokenizer, "onnx", tmp_path)
    check(tokenizer, tmp_path, "onnx", noise(3, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [UNet, VisionTransformer])
def test_the_paper_s_sizes(backbone: type[UNet | VisionTransformer], tmp_path: Path) -> None:
    """Random weights; each half has hundreds of megabytes."""
    torch.manual_seed(0)
    quantizer = GaussianQuantizer(16, latent_channels=16)
    tokenizer = ImageTokenizer(backbone(32, 16), quantizer).eval().requires_grad_(False)
    export_tokenizer(tokenizer, "onnx", tmp_path)
    check(tokenizer, tmp_path, "onnx", noise(1, 3, 256, 256))


def test_the_extra_has_what_is_asked_for() -> None:
    text = (CONFIGS.parent / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^onnx = \[(.*)\]$", text, re.MULTILINE)
    assert [name in extra for name in ("onnx>=", "onnxscript>=", "onnxruntime>=")] == [True] * 3

"""The tokenizers in the box: each is whole, small, what its card says, and found by its name from any folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_tokenizer

from gq_lightning import ImageTokenizer
from gq_lightning.errors import UserError
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokenizer import box
from gq_lightning.tokenizer.folder import CONFIG, WEIGHTS

NAMES = box.names()


def rounded(quantizer: GaussianQuantizer | None = None) -> ImageTokenizer:
    tokenizer = small_tokenizer("unet", quantizer)
    with torch.no_grad():
        for parameter in tokenizer.backbone.parameters():
            parameter.copy_(parameter.half().float())
    return tokenizer


def test_weights_that_half_precision_holds_are_stored_in_half_without_loss(tmp_path: Path) -> None:
    tokenizer = rounded()
    tokenizer.save_pretrained(tmp_path / "rounded")
    small_tokenizer("unet").save_pretrained(tmp_path / "plain")
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("rounded", "plain")]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = ImageTokenizer.from_pretrained(tmp_path / "rounded")
    assert loaded.dtype == torch.float32
    assert loaded.fingerprint == tokenizer.fingerprint
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and tensor.dtype == loaded.state_dict()[name].dtype


def test_one_weight_that_half_precision_does_not_hold_keeps_all(tmp_path: Path) -> None:
    tokenizer = rounded()
    with torch.no_grad():
        next(tokenizer.backbone.parameters()).view(-1)[0] = 1 / 3
    tokenizer.save_pretrained(tmp_path)
    assert "stored" not in json.loads((tmp_path / CONFIG).read_text())["weights"]
    assert ImageTokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_tokenizer_in_half_precision_stays_one(tmp_path: Path) -> None:
    tokenizer = rounded().half()
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert loaded.fingerprint == tokenizer.fingerprint


def test_a_name_is_found_in_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "BOX", tmp_path / "box")
    for bits in (32, 16):
        rounded(GaussianQuantizer(bits, latent_channels=8, codebook_size=256)).save_pretrained(tmp_path / f"box/tiny-{bits}")
    assert box.names() == ["tiny-16", "tiny-32"]
    monkeypatch.chdir(tmp_path)
    assert ImageTokenizer.from_pretrained("tiny-32").tokens_per_position == 4
    with pytest.raises(UserError, match=r"tiny-64: .*shipped tokenizer \(tiny-16, tiny-32\)"):
        ImageTokenizer.from_pretrained("tiny-64", local_files_only=True)
    # a folder of that name is the user's own
    rounded(GaussianQuantizer(16, latent_channels=4, codebook_size=65536)).save_pretrained("tiny-32")
    assert ImageTokenizer.from_pretrained("tiny-32").tokens_per_position == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_the_box(name: str) -> None:
    folder, numbers = box.BOX / name, box.measured(name)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md", "measured.json", "examples.jpg"}
    tokenizer = ImageTokenizer.from_pretrained(name)
    assert tokenizer.fingerprint == numbers["fingerprint"]
    assert name.endswith(f"-{tokenizer.quantizer.bits_per_position:g}")
    images = torch.rand(1, 3, 40, 56) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokenizer.decode(tokens).shape == images.shape
    card = (folder / "README.md").read_text()
    for pictures in ("kodak", "imagenet"):
        assert f"{numbers[pictures]['psnr']:.2f} dB" in card and f"{numbers[pictures]['lpips']:.3f}" in card


def test_the_box_is_small() -> None:
    assert NAMES
    assert sum(path.stat().st_size for path in box.BOX.rglob("*.safetensors")) < 12e6


def test_the_command_lists_them(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "gq_lightning", "models"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin", "COLUMNS": "200"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    for name in NAMES:
        assert name in done.stdout

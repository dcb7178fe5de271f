import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import small_tokenizer, small_training
from torch.quasirandom import SobolEngine

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.cli.main import main
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokenizer.windows import see_in_windows


def images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_shapes_and_ranges(tokenizer: ImageTokenizer) -> None:
    tokens = tokenizer.encode(images(3))
    assert tokens.shape == (3, 4, 4, 2)
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.codebook_size
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == (3, 3, 32, 32)
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad


@pytest.mark.parametrize(("height", "width"), [(40, 64), (96, 32), (56, 72)])
def test_pictures_larger_than_the_window_keep_their_own_grid(tokenizer: ImageTokenizer, height: int, width: int) -> None:
    tokens = tokenizer.encode(images(2, height, width))
    assert tokens.shape == (2, height // 8, width // 8, 2)
    assert tokenizer.decode(tokens).shape == (2, 3, height, width)


def test_tiles_of_a_convolution_agree_inside() -> None:
    """A UNet sees a picture whole or in tiles; normalisation over the tile changes values, so compare what must be equal."""
    tokenizer = small_tokenizer("unet")
    picture = images(1, 96, 96)
    tiled = tokenizer.encode(picture, tile=48)
    assert tiled.shape == (1, 12, 12, 2)
    assert torch.equal(tokenizer.encode(picture, tile=96), tokenizer.encode(picture)), "one tile is no tile"
    # a constant picture has the same statistics in every tile, but for the zero padding at the borders
    flat = torch.zeros(1, 3, 96, 96)
    whole, parts = (tokenizer.backbone.encode(flat), see_in_windows(tokenizer.backbone.encode, flat, 8, 1, None, 96))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("shape", [(1, 3, 33, 32), (1, 3, 32, 4), (1, 1, 32, 32), (3, 32, 32)])
def test_bad_images(tokenizer: ImageTokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        tokenizer.encode(torch.zeros(shape))


def test_more_bad_input() -> None:
    tokenizer = small_tokenizer("vit")
    with pytest.raises(UserError, match="floating point"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="smaller than the backbone"):
        tokenizer.encode(torch.zeros(1, 3, 24, 32))
    with pytest.raises(UserError, match="tile"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32), tile=20)
    with pytest.raises(UserError, match="out of range"):
        tokenizer.decode(torch.full((1, 4, 4, 2), 256))
    with pytest.raises(UserError, match="B, h, w"):
        tokenizer.decode(torch.zeros(4, 4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: (x + 1) * 127.5, r"not from 0.* to 254.*\[0, 255\]: give images / 127.5 - 1"),
        (lambda x: x * 1.1, r"must be in \[-1, 1\], not from -1.09.* to 1.09.*: rescale them"),
        (lambda x: x * 127.5, r"must be in \[-1, 1\]"),
        (lambda x: x * float("nan"), r"must be in \[-1, 1\], not from nan"),
        (lambda x: x + float("inf"), r"must be in \[-1, 1\]"),
        (lambda x: x.to(torch.float8_e4m3fn), "floating point"),
        (lambda x: x.to(torch.complex64), "floating point"),
    ],
)
def test_images_of_another_range(make: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    tokenizer = small_tokenizer("vit")
    for use in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(UserError, match=words):
            use(make(images(2)))


def test_images_from_0_to_1_are_hinted_at_and_rounding_is_none() -> None:
    tokenizer = small_tokenizer("vit")
    with pytest.warns(UserWarning, match=r"no value below 0: if they are in \[0, 1\], give images \* 2 - 1"):
        tokenizer.encode((images(2) + 1) / 2)
    tokenizer.encode(images(1).bfloat16() * 1.004)
    tokenizer.encode(torch.zeros(1, 3, 32, 32))


def test_deterministic_tokens_do_not_depend_on_the_batch(tokenizer: ImageTokenizer) -> None:
    batch = images(7)
    together = tokenizer.encode(batch, deterministic=True)
    for i in range(len(batch)):
        assert torch.equal(tokenizer.encode(batch[i : i + 1], deterministic=True)[0], together[i])


def test_by_default_at_most_one_token_in_a_thousand_depends_on_the_batch(tokenizer: ImageTokenizer) -> None:
    batch = images(64)
    alone = torch.cat([tokenizer.encode(image[None]) for image in batch])
    assert (tokenizer.encode(batch) != alone).float().mean() <= 1e-3


def test_reloaded_tokenizer_is_the_same_to_the_bit(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    batch = images(2, 40, 48)
    before = tokenizer.decode(tokenizer.encode(batch))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(again.decode(again.encode(batch)), before)
    assert again.fingerprint == tokenizer.fingerprint
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_tokenizer("vit").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("position", [3, 100, -1])
def test_a_flipped_byte_is_refused(saved: Path, position: int) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[position] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: SHA-256"):
        ImageTokenizer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 43), ("codebook", "sobol"), ("codebook_size", 255), ("layout", "spiral"), ("colour", 1)]
)
def test_a_changed_recipe_is_refused(saved: Path, field: str, value: object) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["tokenizer"]["init_args"]["quantizer"]["init_args"][field] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"codebook|layout|colour|json") as caught:
        ImageTokenizer.from_pretrained(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("prior_weight", 0.5), ("clamp_variance", False), ("initial_log_variance", -5.0)])
def test_a_changed_number_is_refused(saved: Path, field: str, value: object) -> None:
    """It fits the weights and the codebook, and gives other tokens."""
    config = json.loads((saved / "config.json").read_text())
    config["tokenizer"]["init_args"]["quantizer"]["init_args"][field] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: fingerprint .* is recorded"):
        ImageTokenizer.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(tokenizer: ImageTokenizer, dtype: torch.dtype, tmp_path: Path) -> None:
    """The backbone has the type, codebook and search stay exact: tokens are those of features rounded to it."""
    batch, codewords = images(4), tokenizer.quantizer.codewords.clone()  # type: ignore[operator]
    plain = tokenizer.encode(batch)
    tokenizer.to(dtype)
    assert tokenizer.dtype == dtype and torch.equal(tokenizer.quantizer.codewords, codewords)  # type: ignore[arg-type]
    tokens = tokenizer.encode(batch)
    assert torch.equal(tokens, tokenizer.encode(batch.to(dtype))), "pictures of any type"
    features = tokenizer.backbone.encode(batch.to(dtype)).movedim(1, -1)
    assert torch.equal(tokens, tokenizer.quantizer.tokenize(features.float()))
    decoded = tokenizer.decode(tokens)
    assert decoded.dtype == dtype and decoded.isfinite().all() and tokenizer.reconstruct(batch).images.dtype == torch.float32
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.dtype == dtype and torch.equal(again.encode(batch), tokens), "it is kept in its type"
    share = {torch.float16: 0.9, torch.bfloat16: 0.5, torch.float64: 0.99}[dtype]
    assert (tokens == plain).float().mean() >= share


def test_a_sobol_folder_of_an_earlier_version_is_refused_and_its_checkpoint_converts_again(tmp_path: Path) -> None:
    """Earlier versions drew Sobol points in float64: tokens of theirs mean other codewords."""
    training = small_training("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, codebook="sobol"))
    tokenizer = training.tokenizer
    ours = tokenizer.state_dict()["quantizer.codebook_fingerprint"].clone()
    codewords = torch.special.ndtri(SobolEngine(2, scramble=True, seed=42).draw(256, dtype=torch.float64)).float()
    digest = hashlib.sha256(b"(256, 2)" + codewords.numpy().astype("<f4").tobytes()).digest()
    tokenizer.quantizer.codebook_fingerprint = torch.tensor(list(digest), dtype=torch.uint8)
    assert not torch.equal(tokenizer.quantizer.codebook_fingerprint, ours)
    tokenizer.save_pretrained(tmp_path / "old")
    with pytest.raises(UserError, match=r"old/config\.json: .*drew Sobol points in float64.*convert or import the VAE again"):
        ImageTokenizer.from_pretrained(tmp_path / "old")
    torch.save({"tokenizer": tokenizer.description(), "state_dict": training.state_dict()}, tmp_path / "last.ckpt")
    resumed = small_training("vit", GaussianQuantizer(16, latent_channels=4, codebook_size=256, codebook="sobol"))
    with pytest.raises(UserError, match="drew Sobol points in float64"):
        resumed.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert main(["convert", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "new")]) == 0
    again = ImageTokenizer.from_pretrained(tmp_path / "new")
    assert torch.equal(again.quantizer.codebook_fingerprint, ours)
    assert torch.equal(again.backbone.last_layer, tokenizer.backbone.last_layer)


def test_a_class_from_elsewhere_is_not_imported(saved: Path) -> None:
    text = (saved / "config.json").read_text().replace("gq_lightning.backbones.VisionTransformer", "antigravity.Module")
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"'antigravity.Module' is neither a"):
        ImageTokenizer.from_pretrained(saved)


def test_missing_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json"):
        ImageTokenizer.from_pretrained(tmp_path / "empty")
    (saved / "config.json").write_text('{"format": 1, "tokenizer": {}, "weights": {"sha256": ""}}')
    with pytest.raises(UserError, match="format 1 is not 2: install the version of gq_lightning that wrote it, or train again"):
        ImageTokenizer.from_pretrained(saved)
    (saved / "config.json").write_text("[")
    with pytest.raises(UserError, match="not a tokenizer's config"):
        ImageTokenizer.from_pretrained(saved)
    with pytest.raises(UserError, match="neither a folder, .* nor a reachable tokenizer on the hub"):
        ImageTokenizer.from_pretrained("nobody/nothing", local_files_only=True)


def test_attach_wants_the_same_widths() -> None:
    with pytest.raises(UserError, match="encoder_channels"):
        small_tokenizer("vit").attach(GaussianQuantizer(8, latent_channels=2, codebook_size=256))


def test_reconstruction_shows_tokens_and_posterior_mean(tokenizer: ImageTokenizer) -> None:
    batch = images(2)
    result = tokenizer.reconstruct(batch)
    assert torch.equal(result.images, tokenizer.decode(result.tokens))
    mean = tokenizer.backbone.encode(batch)[:, :4]
    assert result.gaussian is not None
    torch.testing.assert_close(result.gaussian, tokenizer.backbone.decode(mean).clamp(-1, 1))
    assert result.bits is not None
    assert result.bits.shape == result.tokens.shape

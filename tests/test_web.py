"""What the page shows, and what its command refuses; the page itself is looked at in a browser, in tests/web."""

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import small_tokenizer

from gq_lightning import read_tokens
from gq_lightning.cli.main import main
from gq_lightning.cli.web import trial, work
from gq_lightning.errors import UserError
from gq_lightning.quantizers import GaussianQuantizer, LookupFreeQuantizer


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    y, x = np.mgrid[0:40, 0:51] / 51
    Image.fromarray(np.uint8(255 * np.stack([x, y, x * y], axis=-1))).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("backbone", ["unet", "vit"])
def test_a_picture_and_its_token_file(backbone: str, photo: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(backbone).eval()
    (tmp_path / "out").mkdir()
    found = trial.try_picture(tokenizer, photo, None, tmp_path / "out")
    assert found.original is not None and found.heat is not None and found.jpeg is not None and found.difference is not None
    for picture in (found.decoded, found.heat, found.jpeg, found.difference):
        assert picture.size == found.original.size == (51, 40)
    away = np.abs(np.asarray(found.original).astype(int) - np.asarray(found.decoded))
    assert np.array_equal(np.asarray(found.difference), np.minimum(trial.AMPLIFIED * away, 255))
    size = found.token_file.stat().st_size
    assert f"| token file | {size:,} | {8 * size / (51 * 40):.3f} | " in found.sizes
    assert "the codebook has 8. Black is" in found.heat_says

    again = trial.try_token_file({tokenizer.fingerprint: tokenizer}.__getitem__, found.token_file, tmp_path)
    assert np.array_equal(np.asarray(again.decoded), np.asarray(found.decoded))
    assert again.original is None


def test_no_map_where_there_is_none_to_show(photo: Path, tmp_path: Path) -> None:
    exact = GaussianQuantizer(16, latent_channels=4, codebook_size=256, exact_divergence=True)
    for quantizer, says in ((exact, "8.00 everywhere"), (LookupFreeQuantizer(16), "LookupFreeQuantizer has no posterior")):
        (folder := tmp_path / says[:4]).mkdir()
        found = trial.try_picture(small_tokenizer("unet", quantizer).eval(), photo, None, folder)
        assert found.heat is None
        assert says in found.heat_says


def test_a_jpeg_of_as_many_bytes(photo: Path) -> None:
    with Image.open(photo) as picture:
        for most in (900, 1500, 10**6):
            jpeg, quality = trial.jpeg_within(picture, most)
            assert len(jpeg) <= most
            assert quality == 95 or len(trial._encoded(picture, "JPEG", quality=quality + 1, optimize=True)) > most
        assert trial.jpeg_within(picture, 10)[1] == 1


def test_fewer_bits_and_another_tokenizer_s_file(photo: Path, tmp_path: Path) -> None:
    tree = GaussianQuantizer(16, latent_channels=4, codebook_size=256, order="tree")
    for name, quantizer in (("tree", tree), ("plain", None)):
        small_tokenizer("unet", quantizer).eval().save_pretrained(tmp_path / name)
    models = work.Work([str(tmp_path / "plain"), str(tmp_path / "tree")], None, "cpu", None, tmp_path)
    assert [models.rates(name) for name in models.names] == [0, 8]
    found = models.show(str(photo), models.names[1], 3)
    assert read_tokens(found.token_file).codebook_size == 8
    # the tokenizer that made it decodes it, whichever is chosen
    again = models.show(str(found.token_file), models.names[0], 8)
    assert np.array_equal(np.asarray(again.decoded), np.asarray(found.decoded))
    alone = work.Work(models.names[:1], None, "cpu", None, tmp_path)
    with pytest.raises(UserError, match="which is not on this page"):
        alone.show(str(found.token_file), models.names[0], 8)


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (2100, 2000)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="2100x2000 pixels are more than the 4.2 million") as caught:
        trial.try_picture(small_tokenizer("unet"), tmp_path / "large.png", None, tmp_path)
    assert work.sentence(caught.value, str(tmp_path / "large.png")).startswith("large.png: 2100x2000 pixels are more")


def test_a_sentence_tells_nothing_of_this_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upload = str(tmp_path / "a.png")
    assert work.sentence(UserError(f"{upload}: broken ({tmp_path}/a.png)"), upload) == "a.png: broken (/a.png)"
    assert work.sentence(KeyError("secret"), upload) == "Something went wrong here; the log of the page's server says what."
    assert "secret" in caplog.text


def test_where_nothing_can_listen_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            assert main(["web", f"--port={port}"]) == 2
            assert f"--port {port}: nothing can listen there" in capsys.readouterr().err

import ast
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from gq_lightning.data.pictures.reading import BrokenImage
from gq_lightning.errors import UserError
from gq_lightning.quantizers.base import INTEGERS
from gq_lightning.tokens import codec, earlier
from gq_lightning.tokens.codec import SUFFIX, TokenFile, decode_pictures, encode_pictures, fit_picture, read_tokens, write_tokens


@dataclass
class Averages:
    """A tokenizer whose tokens are the colours of small squares in `levels` steps: exact on pictures that are made of such."""

    downsampling: int = 4
    fixed_image_size: int | None = None
    codebook_size: int = 256
    tokens_per_position: int = 3
    fingerprint: str = "a" * 64
    tokens_fingerprint: str = "a" * 64

    def encode(
        self, images: Tensor, deterministic: bool = False, tile: int | None = None, refine: int = 0, distance: object = None
    ) -> Tensor:
        assert all(side % self.downsampling == 0 and side >= (self.fixed_image_size or 1) for side in images.shape[2:])
        assert images.shape[:2] == (1, 3) and images.aminmax().min >= -1 and images.aminmax().max <= 1
        levels = torch.nn.functional.avg_pool2d(images, self.downsampling).add(1).mul((self.codebook_size - 1) / 2)
        return levels.round().long().movedim(1, -1)

    def coarser(self, bits: int) -> "Averages":
        raise UserError("bits: no tree")

    def decode(self, tokens: Tensor, tile: int | None = None) -> Tensor:
        levels = tokens.movedim(-1, 1).float().div((self.codebook_size - 1) / 2).sub(1)
        return torch.nn.functional.interpolate(levels, scale_factor=self.downsampling, mode="nearest")


def exact(window: int | None = None) -> Averages:
    """Its squares are single pixels, so that only what pads, crops and stores can lose anything."""
    return Averages(downsampling=1, fixed_image_size=window)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        return np.asarray(opened)


@pytest.fixture
def sample() -> TokenFile:
    tokens = torch.randint(0, 256, (3, 5, 2), generator=torch.Generator().manual_seed(0))
    return TokenFile(tokens, 11, 20, "11x20 padded to 12x20", "0123456789abcdef" * 4, 256, 4)


# Token files


@pytest.mark.parametrize(("codebook_size", "bits"), [(2, 1), (256, 8), (257, 9), (64000, 16), (65536, 16), (65537, 17), (2**31, 31)])
def test_token_files_are_little_more_than_their_bits(tmp_path: Path, codebook_size: int, bits: int) -> None:
    tokens = torch.randint(0, codebook_size, (6, 4, 3), generator=torch.Generator().manual_seed(1))
    tokens[0, 0, 0], tokens[-1, -1, -1] = 0, codebook_size - 1
    written = TokenFile(tokens, 41, 32, "kept", "f" * 64, codebook_size, 8)
    path = tmp_path / "new" / f"a{SUFFIX}"
    write_tokens(path, written)
    assert path.stat().st_size <= 72 + len("kept") + -(-tokens.numel() * bits // 8)
    read = read_tokens(path)
    assert torch.equal(read.tokens, tokens) and read.tokens.dtype == torch.int64
    assert replace(read, tokens=tokens).__dict__ == written.__dict__
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_tokens_of_every_integer_type_are_written(dtype: torch.dtype, tmp_path: Path, sample: TokenFile) -> None:
    tokens = sample.tokens % 100
    write_tokens(tmp_path / "a", replace(sample, tokens=tokens.to(dtype)))
    assert torch.equal(read_tokens(tmp_path / "a").tokens, tokens)


def test_bits_are_of_the_codebook_and_the_picture() -> None:
    token_file = TokenFile(torch.zeros(2, 2, 3, dtype=torch.int64), 15, 16, "", "f" * 64, 65536, 8)
    assert token_file.bits == 2 * 2 * 3 * 16
    assert token_file.bits_per_pixel == 192 / (15 * 16)


def test_equal_tokens_give_equal_bytes(tmp_path: Path, sample: TokenFile) -> None:
    for name in ("a", "b"):
        write_tokens(tmp_path / name, sample)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", torch.zeros(3, 5, 2)),
        ("tokens", torch.zeros(3, 5, 2**16)[..., :1].expand(3, 5, 2**16).int()),
        ("tokens", torch.zeros(3, 5, dtype=torch.int64)),
        ("tokens", torch.zeros(0, 5, 2, dtype=torch.int64)),
        ("tokens", torch.full((3, 5, 2), -1)),
        ("tokens", torch.full((3, 5, 2), 256)),
        ("height", 0),
        ("height", -11),
        ("height", 13),
        ("height", 11.0),
        ("height", True),
        ("width", 21),
        ("width", "20"),
        ("fit", "two\nlines"),
        ("fit", "\x1b[31m"),
        ("fit", "long" * 100),
        ("fingerprint", "A" * 64),
        ("fingerprint", "a" * 64 + "\n"),
        ("fingerprint", None),
        ("codebook_size", 0),
        ("codebook_size", 2**31 + 1),
        ("downsampling", 0),
    ],
)
def test_fields_that_cannot_be_are_refused_when_built_and_when_read(tmp_path: Path, sample: TokenFile, field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        replace(sample, **{field: value})  # type: ignore[arg-type]

    # the same in a file whose checksum is right
    fields = sample.__dict__ | {field: value}
    tokens = fields["tokens"]
    tokens = tokens if tokens.is_floating_point() else tokens.to(torch.int32)
    path = tmp_path / f"forged{SUFFIX}"
    forge(path, {name: fields[name] for name in ("height", "width", "fit", "fingerprint", "codebook_size", "downsampling")}, tokens)
    with pytest.raises(UserError, match=r"forged.*encode the picture again") as caught:
        read_tokens(path)
    assert "\n" not in str(caught.value)


def forge(path: Path, header: dict[str, object], tokens: Tensor, **others: object) -> None:
    header = {"version": 1} | header
    header = header | {"checksum": earlier.checksum(header, tokens)} | others
    save_file({"tokens": tokens}, path, {"gq_lightning.tokens": json.dumps(header)})


def test_forging_itself_makes_files_that_are_read(tmp_path: Path, sample: TokenFile) -> None:
    """Otherwise the test above would pass for the wrong reason."""
    header = {name: value for name, value in sample.__dict__.items() if name != "tokens"}
    forge(tmp_path / "a", header, sample.tokens.to(torch.int32))
    assert torch.equal(read_tokens(tmp_path / "a").tokens, sample.tokens)
    forge(tmp_path / "b", header, sample.tokens.to(torch.int32), version=2)
    with pytest.raises(UserError, match="checksum"):
        read_tokens(tmp_path / "b")
    forge(tmp_path / "c", header, sample.tokens.to(torch.int32), more=1)
    with pytest.raises(UserError, match="version"):
        read_tokens(tmp_path / "c")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float16, torch.bool])
def test_tokens_of_another_type_are_refused(tmp_path: Path, sample: TokenFile, dtype: torch.dtype) -> None:
    header = {name: value for name, value in sample.__dict__.items() if name != "tokens"}
    forge(tmp_path / "a", header, sample.tokens.to(dtype))
    with pytest.raises(UserError, match="not a token file of this version"):
        read_tokens(tmp_path / "a")


def test_damage_never_goes_unnoticed(tmp_path: Path, sample: TokenFile) -> None:
    """Every truncation, and every byte changed, is an error that names the file, or leaves the contents what they were."""
    path = tmp_path / f"a{SUFFIX}"
    write_tokens(path, sample)
    data = path.read_bytes()
    generator = random.Random(0)
    damaged = [data[:length] for length in range(0, len(data), 3)] + [data + b"\0", b"", b"\xff" * 64, generator.randbytes(500)]
    for position in range(len(data)):
        for byte in (data[position] ^ 1 << generator.randrange(8), generator.randrange(256)):
            damaged.append(data[:position] + bytes([byte]) + data[position + 1 :])
    errors = 0
    for contents in damaged:
        path.write_bytes(contents)
        try:
            read = read_tokens(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            errors += 1
        else:
            assert torch.equal(read.tokens, sample.tokens) and replace(read, tokens=sample.tokens).__dict__ == sample.__dict__
    assert errors > 0.9 * len(damaged)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", "[" * 100_000, '{"version": ' + "9" * 5000 + "}"], ids=range(7))
def test_metadata_that_is_no_header_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"tokens": torch.zeros(1, 1, 1, dtype=torch.uint8)}, tmp_path / "a", {"gq_lightning.tokens": text})
    with pytest.raises(UserError, match="encode the picture again"):
        read_tokens(tmp_path / "a")


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: .*not a token file"):
        read_tokens(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: no such file"):
        read_tokens(tmp_path / "missing")
    with pytest.raises(UserError, match="not a token file"):
        read_tokens(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, sample: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_tokens(path, sample)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


# How a picture meets the grid

SIZES = [(1, 1), (1, 9), (3, 2), (5, 31), (8, 8), (16, 24), (17, 33), (40, 7)]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("size", SIZES)
def test_padding_keeps_the_picture(size: tuple[int, int], window: int | None) -> None:
    image, height, width, done = fit_picture(picture(*size), "pad", 8, window, None)
    assert (height, width) == size
    smallest = tuple(max(-(-side // 8) * 8, window or 0) for side in size)
    assert image.shape == (3, *smallest)
    before = np.asarray(picture(*size))
    restored = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(
        restored, np.pad(before, [(0, smallest[0] - size[0]), (0, smallest[1] - size[1]), (0, 0)], mode="reflect")
    )
    shape = f"{size[0]}x{size[1]}"
    assert done == (f"{shape} kept" if smallest == size else f"{shape} padded to {smallest[0]}x{smallest[1]}")


def test_cropping_takes_the_centre() -> None:
    image, height, width, done = fit_picture(picture(21, 34), "crop", 8, None, None)
    assert (height, width) == (16, 32) == image.shape[1:]
    centre = np.asarray(picture(21, 34))[2:18, 1:33]
    np.testing.assert_array_equal(((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy(), centre)
    assert done == "21x34 cropped to 16x32"
    assert fit_picture(picture(16, 32), "crop", 8, 16, None)[3] == "16x32 kept"


@pytest.mark.parametrize(("size", "window"), [((7, 40), None), ((40, 15), 16)])
def test_a_picture_too_small_to_crop_says_so(tmp_path: Path, size: tuple[int, int], window: int | None) -> None:
    picture(*size).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png: .* too small .* --fit pad"):
        encode_pictures(Averages(8, window), [tmp_path / "small.png"], tmp_path, "crop", progress=False)


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (9, 8), (64, 64)])
def test_resizing_gives_a_square(size: tuple[int, int]) -> None:
    flat = Image.new("RGB", size[::-1], (200, 100, 50))
    image, height, width, done = fit_picture(flat, "resize", 8, None, 16)
    assert image.shape == (3, 16, 16) and (height, width) == (16, 16)
    torch.testing.assert_close(image, (torch.tensor([200.0, 100, 50]) / 127.5 - 1)[:, None, None].expand(3, 16, 16), rtol=0, atol=1e-5)
    assert done.startswith(f"{size[0]}x{size[1]} resized to ") and done.endswith("cropped to 16x16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "squeeze"}, "pad, resize, crop"),
        ({"fit": "resize"}, "needs --size"),
        ({"fit": "pad", "size": 16}, "--size 16 is for --fit resize"),
        ({"fit": "resize", "size": 18}, "such as 16"),
        ({"fit": "resize", "size": 8}, "at least 12, such as 12"),
        ({"fit": "resize", "size": -8}, "at least 12, such as 12"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_pictures(Averages(4, 12), [tmp_path / "not even there"], tmp_path, **options)


# Pictures to files and back


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_round_trip_at_every_size(tmp_path: Path, size: tuple[int, int], window: int | None) -> None:
    picture(*size).save(tmp_path / "a.png")
    [encoded] = encode_pictures(exact(window), [tmp_path / "a.png"], tmp_path / "tokens", progress=False)
    assert encoded == tmp_path / "tokens" / f"a.png{SUFFIX}"
    token_file = read_tokens(encoded)
    assert token_file.tokens.shape == (max(size[0], window or 0), max(size[1], window or 0), 3)
    [decoded] = decode_pictures(exact(window), [encoded], tmp_path / "pictures", progress=False)
    assert decoded == tmp_path / "pictures" / "a.png"
    np.testing.assert_array_equal(pixels(decoded), np.asarray(picture(*size)))


@pytest.mark.parametrize(("fit", "size", "given_back"), [("pad", None, (21, 34)), ("crop", None, (20, 32)), ("resize", 12, (12, 12))])
def test_every_fit_gives_back_what_it_says(tmp_path: Path, fit: str, size: int | None, given_back: tuple[int, int]) -> None:
    picture(21, 34).save(tmp_path / "a.png")
    [encoded] = encode_pictures(Averages(), [tmp_path / "a.png"], tmp_path / "out", fit, size, progress=False)  # type: ignore[arg-type]
    token_file = read_tokens(encoded)
    assert (token_file.height, token_file.width) == given_back
    assert token_file.tokens.shape == (-(-given_back[0] // 4), -(-given_back[1] // 4), 3)
    [decoded] = decode_pictures(Averages(), [encoded], tmp_path / "out", progress=False)
    assert pixels(decoded).shape == (*given_back, 3)


def test_folders_keep_their_structure_and_names_stay_distinct(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "summer").mkdir(parents=True)
    names = ["a.png", "a.bmp", "b [1].png", "summer/a.png"]
    for seed, name in enumerate(names):
        picture(5, 6, seed).save(photos / name)
    encoded = encode_pictures(exact(), [photos], tmp_path / "tokens", progress=False)
    assert sorted(encoded) == sorted(tmp_path / "tokens" / f"{name}{SUFFIX}" for name in names)
    decoded = decode_pictures(exact(), [tmp_path / "tokens"], tmp_path / "back", progress=False)
    assert {str(path.relative_to(tmp_path / "back")) for path in decoded} == {"a.png.png", "a.bmp.png", "b [1].png", "summer/a.png"}
    for name, back in zip(names, ["a.png.png", "a.bmp.png", "b [1].png", "summer/a.png"], strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / "back" / back), pixels(photos / name))


def test_two_pictures_for_one_file_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        picture(4, 4).save(tmp_path / folder / "a.png")
    with pytest.raises(UserError, match="different --out"):
        encode_pictures(exact(), [tmp_path / "one", tmp_path / "two"], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # the same picture named twice is one picture
    assert len(encode_pictures(exact(), [tmp_path / "one", tmp_path / "one" / "a.png"], tmp_path / "out", progress=False)) == 1


def test_an_original_beside_its_tokens_is_not_overwritten(tmp_path: Path) -> None:
    picture(4, 4).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    encode_pictures(exact(), [tmp_path], tmp_path, progress=False)
    with pytest.raises(UserError, match="choose another --out"):
        decode_pictures(exact(), [tmp_path], tmp_path, progress=False)
    assert (tmp_path / "a.png").read_bytes() == before


def test_each_picture_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(21, 34).save(tmp_path / "a [b].png")
    encode_pictures(Averages(), [tmp_path / "a [b].png"], tmp_path / "out")
    line = capsys.readouterr().out
    assert "a [b].png: 21x34 padded to 24x36, 162 tokens, 1296 bits, 1.8151 bits per pixel, a file of " in line
    decode_pictures(Averages(), [tmp_path / "out"], tmp_path / "out")
    assert "a [b].png: 21x34 from 162 tokens (21x34 padded to 24x36)\n" in capsys.readouterr().out
    encode_pictures(Averages(), [tmp_path / "a [b].png"], tmp_path / "out", progress=False)
    assert capsys.readouterr() == ("", "")


def test_broken_pictures_are_an_error_or_skipped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(4, 4).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    with pytest.raises(BrokenImage, match=r"bad\.png"):
        encode_pictures(exact(), [tmp_path], tmp_path / "out", progress=False)
    written = encode_pictures(exact(), [tmp_path], tmp_path / "out", skip_broken=True, progress=False)
    assert [path.name for path in written] == [f"good.png{SUFFIX}"]
    errors = capsys.readouterr().err
    assert "bad.png" in errors and "1 of 2 pictures" in errors
    with pytest.raises(UserError, match="none of the 1 pictures"):
        encode_pictures(exact(), [tmp_path / "bad.png"], tmp_path / "out", skip_broken=True, progress=False)


def test_broken_pictures_are_named_before_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a[").mkdir()
    (tmp_path / "a[/x]:smile:.png").write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    monkeypatch.setattr("gq_lightning.tokens.codec.write_tokens", lambda *_: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception):
        encode_pictures(exact(), [tmp_path], tmp_path / "out", skip_broken=True)
    assert f"{tmp_path}/a[/x]:smile:.png: not a picture" in capsys.readouterr().err


def test_every_console_takes_names_as_they_are() -> None:
    """Brackets in them are no markup, colons no emoji; `printable` escapes what is no text."""
    package = Path(codec.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert settings.get("markup") == settings.get("emoji") == "False", f"{path}:{node.lineno}"


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    picture(4, 4).save(tmp_path / "a.png")
    [encoded] = encode_pictures(Averages(), [tmp_path / "a.png"], tmp_path / "out", progress=False)
    other = Averages(fingerprint="b" * 64, tokens_fingerprint="b" * 64)
    with pytest.raises(UserError, match=r"a\.png\.tokens.*made by tokenizer aaaaaaaaaaaa, this one is bbbbbbbbbbbb.*any_tokenizer"):
        decode_pictures(other, [encoded], tmp_path / "out", progress=False)
    [decoded] = decode_pictures(other, [encoded], tmp_path / "out", progress=False, any_tokenizer=True)
    assert pixels(decoded).shape == (4, 4, 3)
    for unlike, message in (
        (replace(other, downsampling=8), "downsampling"),
        (replace(other, tokens_per_position=1), "tokens per position"),
    ):
        with pytest.raises(UserError, match=rf"a\.png\.tokens.*{message}"):
            decode_pictures(unlike, [encoded], tmp_path / "back", progress=False, any_tokenizer=True)


def test_tokens_beyond_the_codebook_are_named(tmp_path: Path) -> None:
    path = tmp_path / f"a{SUFFIX}"
    write_tokens(path, TokenFile(torch.full((1, 1, 3), 200), 4, 4, "kept", "a" * 64, 256, 4))
    with pytest.raises(UserError, match=r"a\.tokens: token 200 is out of range, this codebook has 128"):
        decode_pictures(Averages(codebook_size=128), [path], tmp_path / "out", progress=False)


def test_a_few_bytes_do_not_ask_for_a_huge_picture(tmp_path: Path) -> None:
    path = tmp_path / f"a{SUFFIX}"
    write_tokens(path, TokenFile(torch.zeros(128, 128, 3, dtype=torch.uint8), 4, 4, "kept", "a" * 64, 256, 256))
    with pytest.raises(UserError, match=r"a\.tokens: 32768 x 32768 pixels are more than"):
        decode_pictures(Averages(downsampling=256), [path], tmp_path / "out", progress=False)


def test_nothing_to_decode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file with the suffix"):
        decode_pictures(exact(), [tmp_path], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="no such file"):
        decode_pictures(exact(), [tmp_path / "missing"], tmp_path / "out", progress=False)

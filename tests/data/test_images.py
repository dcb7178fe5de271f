import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gq_lightning.data import BrokenImage, center_crop, find_pictures, load_picture, resize_shorter, to_picture, to_tensor
from gq_lightning.data.pictures import reading
from gq_lightning.data.pictures.listing import OTHER_SUFFIXES, PICTURE_SUFFIXES, is_picture
from gq_lightning.errors import UserError
from gq_lightning.tokens.token_file import read_tokens


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    picture = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_every_value_survives_the_round_trip() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([values, values.T, 255 - values], axis=-1)
    image = to_tensor(Image.fromarray(pixels))
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
    assert image.min() == -1 and image.max() == 1
    assert np.array_equal(np.asarray(to_picture(image)), pixels)


def test_to_picture_clamps_and_rounds_to_the_nearest() -> None:
    levels = torch.tensor([-7.0, 7.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1])
    pixels = np.asarray(to_picture(levels.view(1, 1, 4).expand(3, 1, 4)))
    assert pixels[0, :, 0].tolist() == [0, 255, 100, 101]


def test_lossless_files_are_read_pixel_by_pixel(tmp_path: Path) -> None:
    pixels = noise(5, 7)
    for suffix in ("png", "bmp", "tif", "ppm"):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
        assert np.array_equal(read(tmp_path / f"a.{suffix}"), pixels), suffix


# where each orientation has the stored pixels (rows from the top) when it is seen upright: Exif 2.32, tag 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels, exif = noise(4, 6), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), UPRIGHT[orientation](pixels))


def test_grey_and_palette(tmp_path: Path) -> None:
    grey = noise(4, 4, 1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "palette.png")
    assert read(tmp_path / "palette.png").reshape(4, 3).tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]]
    palette.save(tmp_path / "hole.png", transparency=2)
    assert read(tmp_path / "hole.png").reshape(4, 3).tolist() == [[10, 20, 30], [40, 50, 60], [255, 255, 255], [100, 110, 120]]
    Image.fromarray(grey > 127).save(tmp_path / "bilevel.png")
    assert np.array_equal(read(tmp_path / "bilevel.png")[..., 0], np.where(grey > 127, 255, 0))


def test_transparency_shows_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[200, 0, 100, 0], [200, 0, 100, 255], [200, 0, 100, 51]]], dtype=np.uint8)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [200, 0, 100], [244, 204, 224]]  # 51 is one fifth
    Image.fromarray(np.array([[[50, 0], [50, 255]]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png")[0].tolist() == [[255] * 3, [50] * 3]


def test_cmyk(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:, :, 0] = 255  # cyan
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 32768, 65406, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(levels).save(path)
    expected = np.rint(levels.astype(np.float64) * 255 / 65535).astype(int)
    assert np.array_equal(read(path)[..., 0], expected) and np.array_equal(read(path)[..., 2], expected)
    assert expected.tolist() == [[0, 0, 1, 128, 254, 255]]


def test_16_bit_colour_loses_less_than_a_level(tmp_path: Path) -> None:
    levels = np.array([[[0, 30000, 65535], [257, 40000, 12345]]], dtype=">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + levels.tobytes())) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert np.abs(read(tmp_path / "a.png") - levels.astype(np.float64) / 257).max() < 1


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "a.gif") == [255, 0, 0]).all()


def test_broken_files_are_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(name: str) -> str:
        with pytest.raises(BrokenImage) as caught:
            load_picture(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message
        return message.removeprefix(f"{tmp_path / name}: ")

    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-1000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)).save(tmp_path / "deep.tif")
    assert "truncated" in reason("truncated.jpg")
    assert "empty" in reason("empty.png")
    assert "not a picture" in reason("text.png")
    assert "folder" in reason("folder.png")
    assert "not exist" in reason("missing.png")
    assert "floating-point" in reason("float.tif")
    assert "65535" in reason("deep.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 4096 is past the limit, but not past twice the limit
    assert load_picture(tmp_path / "whole.jpg").size == (64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too many pixels" in reason("whole.jpg")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(BrokenImage, match=r"a\.png: no permission"):
        load_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(640, 427, (383, 256)), (427, 640, (256, 383)), (100, 50, (512, 256)), (9, 9, (256, 256))]
)
def test_resize_shorter(width: int, height: int, expected: tuple[int, int]) -> None:
    assert resize_shorter(Image.new("RGB", (width, height)), 256).size == expected


def test_resize_is_antialiased_and_keeps_what_fits() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0], [255]], dtype=np.uint8)[..., None].repeat(3, 2), (64, 128, 1)))
    assert np.abs(np.asarray(resize_shorter(stripes, 16)).astype(int) - 127.5).max() < 25  # aliasing would give 0 or 255
    assert resize_shorter(stripes, 128) is stripes


def test_center_crop() -> None:
    pixels = noise(9, 12)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 5)), pixels[2:7, 4:9])
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 6)), pixels[2:8, 3:9])
    with pytest.raises(ValueError, match="cannot crop 10"):
        center_crop(Image.fromarray(pixels), 10)


def test_find_pictures(tmp_path: Path) -> None:
    for name in ("b/z.JPEG", "b/c/y.png", "a.webp", "notes.txt", "b/._z.JPEG", ".cache/x.png", "extra.raw"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "c" / "up").symlink_to(tmp_path / "b")  # a loop
    expected = [tmp_path / name for name in ("a.webp", "b/c/y.png", "b/z.JPEG")]
    assert find_pictures([tmp_path]) == expected
    assert find_pictures([str(tmp_path / "extra.raw"), tmp_path, tmp_path / "a.webp"]) == sorted([*expected, tmp_path / "extra.raw"])


def test_find_pictures_follows_links_to_folders(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    assert find_pictures([tmp_path / "root"]) == [tmp_path / "root" / "linked" / "a.png"]


def test_find_pictures_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_pictures([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="has no pictures"):
        find_pictures([tmp_path])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_16_bit_grey_with_transparency(tmp_path: Path) -> None:
    """By a value that is transparent, to all of its 16 bits, and by a channel."""
    for kind, levels, extra in (
        (0, [[0, 12850, 12851, 65535]], chunk(b"tRNS", struct.pack(">H", 12850))),
        (4, [[[0, 65535], [12850, 0], [12851, 65535], [65535, 65535]]], b""),
    ):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 16, kind, 0, 0, 0)) + extra
        body = chunk(b"IDAT", zlib.compress(b"\0" + np.array(levels, dtype=">u2").tobytes())) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        assert read(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 50, 255]


# VmHWM, since the peak that resource knows begins with that of the process which started this one
MEMORY = """
import re, sys
from pathlib import Path
from gq_lightning.data.pictures.reading import load_picture

def bytes_of(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_picture(sys.argv[1])
filler = b"x" * (bytes_of("VmHWM") - bytes_of("VmRSS"))  # what the imports have given back would hide the picture
before = bytes_of("VmHWM")
load_picture(sys.argv[2])
print(bytes_of("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
@pytest.mark.parametrize(("mode", "most"), [("RGB", 5.0), ("RGBA", 9.5), ("I;16", 9.5)])
def test_memory_of_large_pictures(mode: str, most: float, tmp_path: Path) -> None:
    """Bytes a pixel: Pillow's own four, as many as it takes for what is not RGB already, and some rows of what is between."""
    side = 2600
    for size in (16, side):
        picture = (
            Image.fromarray(np.full((size, size), 40_000, dtype=np.uint16)) if mode == "I;16" else Image.new(mode, (size, size), "red")
        )
        picture.save(tmp_path / f"{size}.png")
    call = [sys.executable, "-c", MEMORY, str(tmp_path / "16.png"), str(tmp_path / f"{side}.png")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert int(subprocess.run(call, check=True, capture_output=True, env=environment).stdout) / side**2 < most


def test_rows_join(tmp_path: Path) -> None:
    """A picture of more rows than are converted at a time."""
    pixels = noise(600, 5, 4)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", (5, 600), "white"), Image.fromarray(pixels)).convert("RGB")
    assert np.array_equal(read(tmp_path / "a.png"), np.asarray(white))


def test_every_suffix_of_a_format_that_is_read_is_known() -> None:
    Image.init()
    for suffix, name in Image.registered_extensions().items():
        if name in reading.FORMATS and suffix not in (".pfm",):  # floating point
            assert is_picture(f"a{suffix}") and is_picture(f"A{suffix.upper()}"), suffix
        else:
            assert not is_picture(f"a{suffix}"), suffix
    assert not set(PICTURE_SUFFIXES) & set(OTHER_SUFFIXES)


def test_other_pictures_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jfif", "b.JPE", "c.heic", "d/e.HEIC", "f.psd", "notes.txt", ".g.psd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_pictures([tmp_path])] == ["a.jfif", "b.JPE"]
    assert caplog.messages == [f"{tmp_path}: skipped 2 .heic, 1 .psd: these formats are not supported, convert them to PNG or JPEG"]


def test_postscript_never_reaches_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("interpreted"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(BrokenImage, match="not a picture in a known format"):
        load_picture(tmp_path / "a.jpg")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (listener := socket.socket(socket.AF_UNIX)).bind(str(tmp_path / "s.png"))
    listener.close()
    for path in (tmp_path / "pipe.png", tmp_path / "s.png", Path("/dev/zero")):
        with pytest.raises(BrokenImage, match="a named pipe, a device or a socket is not read$"):
            load_picture(path)
        with pytest.raises(UserError, match="a named pipe, a device or a socket is not read"):
            read_tokens(path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb\x1b[31m\u202e"])
def test_names_that_no_file_has(name: str) -> None:
    for path in (name, f"{name}.png"):
        with pytest.raises(UserError) as caught:
            find_pictures([path])
        assert str(caught.value).isprintable() and "does not exist" in str(caught.value)

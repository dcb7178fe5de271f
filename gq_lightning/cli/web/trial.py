"""What the page shows of one upload, by the functions of `encode` and `decode`; nothing here knows of a page.

picture ----> token file, decoded, difference, bits of each token, JPEG of as many bytes, sizes
token file -> decoded, sizes
"""

import io
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageChops

from gq_lightning.data import load_picture
from gq_lightning.errors import UserError
from gq_lightning.evaluation.panel import heat_map
from gq_lightning.files import open_regular
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.tokens.codec import decode_pictures, encode_pictures, fit_picture
from gq_lightning.tokens.token_file import SUFFIXES, read_tokens

MOST_PIXELS = 2**22
TILE = 512
AMPLIFIED = 4
# of the heat map's scale at least, in bits: half of the TDC's band
LEAST_REACH = 0.5


@dataclass(frozen=True)
class Trial:
    """Pictures and what is said of them; None where an upload has no such thing."""

    original: Image.Image | None
    decoded: Image.Image
    difference: Image.Image | None
    heat: Image.Image | None
    jpeg: Image.Image | None
    token_file: Path
    sizes: str
    heat_says: str


def is_token_file(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def try_picture(tokenizer: ImageTokenizer, path: Path, bits: int | None, folder: Path) -> Trial:
    """Encodes a picture, decodes its token file, which stays in the empty `folder`, and compares. `bits` of each token are kept; None keeps
    all. Raises UserError if it is no picture, or has more than `MOST_PIXELS`."""
    original = _checked(path)
    (token_file,) = encode_pictures(tokenizer, [path], folder, tile=_tile(tokenizer), progress=False, bits=bits)
    decoded = _decode(tokenizer, token_file, folder)
    png, limit = _encoded(original, "PNG"), token_file.stat().st_size
    jpeg, quality = jpeg_within(original, limit)
    with Image.open(io.BytesIO(jpeg)) as picture:
        as_jpeg = picture.convert("RGB")
    difference = ImageChops.difference(original, decoded).point(lambda value: min(255, AMPLIFIED * value))
    rows = [
        ("as uploaded", path.stat().st_size, ""),
        ("PNG", len(png), ""),
        ("token file", limit, _psnr(original, decoded)),
        (f"JPEG, quality {quality}", len(jpeg), _psnr(original, as_jpeg)),
    ]
    heat, says = _heat(tokenizer, original)
    return Trial(original, decoded, difference, heat, as_jpeg, token_file, _table(rows, original), says)


def try_token_file(tokenizer_of: Callable[[str], ImageTokenizer], path: Path, folder: Path) -> Trial:
    """Decodes a token file by the tokenizer of the fingerprint that it names, which `tokenizer_of` finds. Raises UserError."""
    found = read_tokens(path)
    _check_pixels(found.width, found.height)
    decoded = _decode(tokenizer_of(found.fingerprint), path, folder)
    rows = [("token file", path.stat().st_size, ""), ("decoded, as PNG", len(_encoded(decoded, "PNG")), "")]
    return Trial(None, decoded, None, None, None, path, _table(rows, decoded), "")


def _checked(path: Path) -> Image.Image:
    """The picture, upright and RGB; its size is looked at before its pixels."""
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            size = picture.size
    except (OSError, ValueError, Image.DecompressionBombError):
        size = (0, 0)  # what is wrong with it, loading it says
    _check_pixels(*size)
    return load_picture(path)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{width}x{height} pixels are more than the {MOST_PIXELS / 1e6:.1f} million that this page takes: make the picture smaller, or"
            " use `python -m gq_lightning encode`"
        )


def _decode(tokenizer: ImageTokenizer, token_file: Path, folder: Path) -> Image.Image:
    (decoded,) = decode_pictures(tokenizer, [token_file], folder / "decoded", tile=_tile(tokenizer), progress=False)
    return load_picture(decoded)


def _tile(tokenizer: ImageTokenizer) -> int | None:
    return None if tokenizer.fixed_image_size else max(TILE // tokenizer.downsampling, 4) * tokenizer.downsampling


def _heat(tokenizer: ImageTokenizer, picture: Image.Image) -> tuple[Image.Image | None, str]:
    image, height, width, _ = fit_picture(picture, "pad", tokenizer.downsampling, tokenizer.fixed_image_size, None)
    bits = tokenizer.reconstruct(image[None], _tile(tokenizer)).bits
    if bits is None:
        return None, f"{type(tokenizer.quantizer).__name__} has no posterior, and so no bits per token to show."
    bits, target = bits[0].float(), math.log2(tokenizer.codebook_size)
    reach = max(LEAST_REACH, float((bits - target).abs().max()))
    drawn = heat_map(bits.mean(-1), target - reach, target + reach)
    size = (image.shape[2], image.shape[1])
    drawn = drawn.resize(size, Image.Resampling.NEAREST).crop((0, 0, width, height))
    lowest, mean, highest = (float(value) for value in (bits.min(), bits.mean(), bits.max()))
    if highest - lowest < 0.01:
        return (
            None,
            f"**Bits per token**: {mean:.2f} everywhere, so that there is no map to show; the codebook has {target:g}.",
        )
    return drawn, (
        f"**Bits per token**: {lowest:.2f} to {highest:.2f}, {mean:.2f} on average; the codebook has {target:g}."
        f" Black is {target - reach:.1f}, red {target:g}, pale yellow {target + reach:.1f}."
    )


def _encoded(picture: Image.Image, format: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def jpeg_within(picture: Image.Image, most: int) -> tuple[bytes, int]:
    """The JPEG of the highest quality up to 95 that takes at most so many bytes, else of the lowest; and its quality."""
    jpeg = partial(_encoded, picture, "JPEG", optimize=True)
    quality = max(1, bisect_right(range(1, 96), most, key=lambda quality: len(jpeg(quality=quality))))
    return jpeg(quality=quality), quality


def _psnr(original: Image.Image, other: Image.Image) -> str:
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from torchvision.transforms.functional import pil_to_tensor

    first, second = (pil_to_tensor(picture).float() for picture in (original, other))
    value = float(peak_signal_noise_ratio(second, first, data_range=255.0)) if not torch.equal(first, second) else math.inf
    return f"{value:.2f} dB"


def _table(rows: list[tuple[str, int, str]], picture: Image.Image) -> str:
    pixels = picture.width * picture.height
    lines = [f"| {picture.width} x {picture.height} pixels | bytes | bits per pixel | PSNR |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {size:,} | {8 * size / pixels:.3f} | {psnr} |" for name, size, psnr in rows]
    return "\n".join(lines)

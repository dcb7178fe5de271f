"""Picture files to tensors and back.

file --load_picture--> upright RGB picture --resize_shorter, center_crop--> square --to_tensor--> (3, H, W) in [-1, 1]
"""

import io
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gq_lightning.construction import Size, sides
from gq_lightning.errors import UserError
from gq_lightning.files import open_regular, write_whole

# Pillow's names of the supported formats. For some others it would start an interpreter (PostScript), whatever the file's suffix is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
ROWS = 256  # converted at a time, to bound the memory of the intermediate result
# The published resizing (https://arxiv.org/abs/2512.06609), which is the default of torchvision's Resize on Pillow images, in training and
# evaluation. Bicubic interpolation and a rounded longer side would change PSNR by half a decibel.
RESAMPLING = Image.Resampling.BILINEAR
INTERPOLATION = f"{RESAMPLING.name.lower()}, antialiased (Pillow), longer side truncated"

# what `shard` does with pictures that cannot be decoded
WhenBroken = Literal["leave-out", "keep", "unchecked"]


class BrokenImage(UserError):
    """A file that cannot be read as a picture; the message names the file and the reason."""


# of a picture's width and height, the smallest that suffice
Suffices = Callable[[int, int], tuple[int, int]]


def load_picture(file: str | Path | BinaryIO, name: str | Path | None = None, suffices: Suffices | None = None) -> Image.Image:
    """The picture as upright 8-bit RGB: EXIF orientation applied, transparency on white, the first frame of an animation.

    16-bit grey pictures are scaled (65535 is white), not clipped; for other pictures with 16 bits per channel, Pillow keeps the upper
    eight. CMYK is converted by Pillow's formula, and embedded colour profiles are ignored. Raises BrokenImage if the file is missing,
    unreadable, truncated, not a picture, a decompression bomb, or has floating-point pixels.

    Args:
        file: a path, or a file at its beginning.
        name: the name in messages; by default the path.
        suffices: lets a JPEG file be decoded at 1/2, 1/4 or 1/8 of its size, if that is no smaller than the size it gives. Takes a
            fraction of the time, but averages pixels unlike `RESAMPLING`; not for evaluation.
    """
    try:
        # Pillow warns about odd metadata and large pictures, both harmless; for decompression bombs it raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_regular(file) if isinstance(file, str | Path) else nullcontext(file) as opened:
                if not opened.read(1):
                    raise BrokenImage("the file is empty")
                opened.seek(0)
                with Image.open(opened, formats=_formats()) as picture:
                    if suffices is not None:
                        picture.draft("RGB", suffices(*picture.size))
                    ImageOps.exif_transpose(picture, in_place=True)
                    return _to_rgb(picture)
    except Exception as error:  # Pillow's readers raise nearly every built-in exception on damaged files
        raise BrokenImage(f"{name or file}: {_reason(error)}") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # some builds of Pillow lack AVIF


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no defined white, convert the picture to 8 or 16 bits")
    picture.load()
    deep = picture.mode.startswith("I")
    if not deep and not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    result = Image.new("RGB", picture.size, "white")
    for top in range(0, picture.height, ROWS):
        rows = picture.crop((0, top, picture.width, min(top + ROWS, picture.height)))
        if deep:
            rows = Image.fromarray(_from_16_bits(np.asarray(rows), picture.info.get("transparency")))
        else:
            rows = rows.convert("RGBA")
            rows = Image.alpha_composite(Image.new("RGBA", rows.size, "white"), rows)
        result.paste(rows.convert("RGB"), (0, top))
    return result


def _from_16_bits(grey: np.ndarray, transparent: object) -> np.ndarray:
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("grey values outside 0..65535, convert the picture to 8 or 16 bits")
    scaled = ((values + 128) // 257).astype(np.uint8)  # rounds value * 255 / 65535
    return np.where(values == transparent, np.uint8(255), scaled) if isinstance(transparent, int) else scaled


def _reason(error: Exception) -> str:
    match error:
        case BrokenImage():
            return str(error)
        case FileNotFoundError():
            return "the file does not exist"
        case PermissionError():
            return "no permission to read the file"
        case IsADirectoryError():
            return "is a folder, not a picture"
        case UnidentifiedImageError():
            return "not a picture in a known format"
        case Image.DecompressionBombError():
            return f"too many pixels to be a picture ({Image.MAX_IMAGE_PIXELS} is large, twice that is refused)"
        case OSError(strerror=str(reason)):
            return f"cannot be read: {reason}"
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W): 0 becomes -1 and 255 becomes 1."""
    return scale_pixels(to_pixels(picture))


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W), a view of (H, W, 3) in memory."""
    return torch.from_numpy(np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))).permute(2, 0, 1)


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape to float32 in [-1, 1], contiguous."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def as_images(batch: Tensor) -> Tensor:
    """Images on the way to a network: uint8 pixels become float32 in [-1, 1] on their device, others stay as they are."""
    return scale_pixels(batch) if batch.dtype == torch.uint8 else batch


def to_picture(image: Tensor) -> Image.Image:
    """A tensor (3, H, W), clamped to [-1, 1], as an 8-bit picture with rounded values: the inverse of `to_tensor`."""
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    write_whole(path, encoded.getvalue())


def resize_shorter(picture: Image.Image, size: Size) -> Image.Image:
    """The picture resized to a shorter side of `size` pixels, the longer side in proportion and truncated (see `INTERPOLATION`).

    For a height and a width, the side that has to grow the most, or may shrink the least, gets its length, so that the result covers both.
    Raises BrokenImage if the picture is so long and thin that the result would have more pixels than Pillow decodes.
    """
    return resize_by(picture, *closest_side(picture, size))


def closest_side(picture: Image.Image, size: Size) -> tuple[int, int]:
    """The length that one side of `size` has, and that of the same side of the picture: the one that resizing to `size` changes the most
    if it enlarges, the least if it shrinks."""
    height, width = sides(size)
    if height * picture.width >= width * picture.height:
        return height, picture.height
    return width, picture.width


def resize_by(picture: Image.Image, length: int, present: int) -> Image.Image:
    """The picture with sides in proportion, truncated, of which one of `present` pixels becomes `length`. Raises BrokenImage, see above."""
    width, height = picture.size
    target = (width * length // present, height * length // present)
    if Image.MAX_IMAGE_PIXELS and target[0] * target[1] > 2 * Image.MAX_IMAGE_PIXELS:
        raise BrokenImage(f"too long and thin to be a picture: {width} x {height} pixels would become {target[0]} x {target[1]}")
    return picture if target == picture.size else picture.resize(target, RESAMPLING)


def extended(pixels: Tensor, step: int, least: Size | None) -> Tensor:
    """Pixels (..., H, W), extended at the right and the bottom by reflection to multiples of `step` that are at least `least`."""
    for axis, smallest in zip((-2, -1), sides(least or step), strict=True):
        length = pixels.shape[axis]
        if (target := max(math.ceil(length / step) * step, smallest)) != length:
            # up and down [0, length) repeatedly: reflection, even of a single pixel
            index = torch.arange(target, device=pixels.device) % max(2 * (length - 1), 1)
            pixels = pixels.index_select(axis, torch.minimum(index, 2 * (length - 1) - index))
    return pixels


def centred(length: int, size: int) -> int:
    """Start of the central `size` of `length` pixels; halves are rounded to even, as in torchvision."""
    return round((length - size) / 2)


def center_crop(picture: Image.Image, size: Size) -> Image.Image:
    """The central `size` pixels, as torchvision crops them. Neither side may be shorter."""
    height, width = sides(size)
    if picture.height < height or picture.width < width:
        raise ValueError(f"cannot crop {height} x {width} pixels from a picture of {picture.height} x {picture.width}")
    left, top = centred(picture.width, width), centred(picture.height, height)
    return picture.crop((left, top, left + width, top + height))

"""Picture files to tensors and back.

file --load_picture--> upright RGB picture --resize_shorter, center_crop--> square --to_tensor--> (3, H, W) in [-1, 1]
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gq_lightning.errors import UserError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


class BrokenImage(UserError):
    """A file that cannot be read as a picture; the message names the file and the reason."""


def load_picture(path: str | Path) -> Image.Image:
    """The picture as 8-bit RGB, upright: EXIF orientation applied, transparency laid over white, the first frame of an animation.

    Grey pictures of 16 bits are scaled (65535 is white), not clipped; of other pictures with 16 bits a channel Pillow keeps the
    upper eight. CMYK is converted by Pillow's formula, and embedded colour profiles are ignored.

    Raises:
        BrokenImage: the file is missing, unreadable, truncated, no picture, a decompression bomb, or has floating-point pixels.
    """
    try:
        # Pillow warns of odd metadata and of large pictures, neither of which stops it; its limit for bombs raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                return _to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # Pillow's readers raise nearly every built-in exception on damaged files
        raise BrokenImage(f"{path}: {_reason(Path(path), error)}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return Image.fromarray(_scale_16_bits(np.asarray(picture))).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no fixed white, convert the picture to 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _scale_16_bits(grey: np.ndarray) -> np.ndarray:
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("grey values outside 0..65535, convert the picture to 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)  # rounds value * 255 / 65535


def _reason(path: Path, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "the file does not exist"
        case PermissionError():
            return "no permission to read the file"
        case IsADirectoryError():
            return "is a folder, not a picture"
        case UnidentifiedImageError():
            return "the file is empty" if path.stat().st_size == 0 else "not a picture in a known format"
        case Image.DecompressionBombError():
            return f"too many pixels to be a picture ({Image.MAX_IMAGE_PIXELS} is large, twice that is refused)"
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W): 0 becomes -1 and 255 becomes 1."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return scale_pixels(pixels.permute(2, 0, 1).contiguous())


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_picture(image: Tensor) -> Image.Image:
    """A tensor (3, H, W), clamped to [-1, 1], as the nearest 8-bit picture: the inverse of `to_tensor`."""
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize_shorter(picture: Image.Image, size: int) -> Image.Image:
    """The picture with a shorter side of `size` pixels, aspect ratio kept (rounded): bicubic, antialiased, by Pillow."""
    width, height = picture.size
    shorter = min(width, height)
    target = (round(width * size / shorter), round(height * size / shorter))
    return picture if target == picture.size else picture.resize(target, Image.Resampling.BICUBIC)


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels; where an odd margin has no middle, torchvision's choice. No side may be shorter."""
    if min(picture.size) < size:
        raise ValueError(f"cannot crop {size} pixels from a picture of {picture.width} x {picture.height}")
    return transforms.center_crop(picture, [size, size])


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, whatever their suffix, and all pictures in the folders named, recursively; sorted, each once.

    Names that begin with a dot are passed over (file managers leave broken pictures there); links to folders are followed.

    Raises:
        UserError: a path does not exist, or a folder has no pictures or cannot be listed.
    """
    found: set[Path] = set()
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            pictures = list(_walk(path))
            if not pictures:
                raise UserError(f"{path} has no pictures: put files there that end in {', '.join(PICTURE_SUFFIXES)}")
            found.update(pictures)
        elif path.exists():
            found.add(path)
        else:
            raise UserError(f"{path} does not exist: name a picture or a folder of pictures")
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

    visited: set[str] = set()
    for current, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(current)
        if real in visited:  # a link back to a folder above it
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(current, name) for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith("."))

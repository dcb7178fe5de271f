"""Picture sets: map-style datasets of float tensors with stable names, and the crops that prepare pictures."""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from gq_lightning.construction import Size, sides
from gq_lightning.data.pictures.reading import (
    RESAMPLING,
    BrokenImage,
    Suffices,
    center_crop,
    closest_side,
    load_picture,
    resize_by,
    resize_shorter,
    scale_pixels,
    to_picture,
    to_pixels,
)
from gq_lightning.errors import UserError
from gq_lightning.files import open_regular

TAIL = 1024
Cut = Literal["resized", "fast", "plain", "native", "center"]


class PictureSet(Dataset[Tensor], ABC):
    """The contract: `set[index]` is float32 (3, height, width) in [-1, 1], or raises BrokenImage.

    Random crops use torch's CPU random numbers, which training seeds for each picture.

    Attributes:
        split: name of this part of the data, without machine paths.
        resize: description of the resizing.
        crop: description of the cropping.
    """

    split: str
    resize: str
    crop: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor: ...

    def pixels(self, index: int) -> Tensor:
        """`set[index]` as it travels to the device: uint8 where it has not been converted yet, which is a quarter of the bytes."""
        return self[index]

    def whole(self, index: int) -> Image.Image:
        """The upright RGB picture that `set[index]` is cut from, or that crop if there is no larger one. Raises BrokenImage."""
        return to_picture(self[index])

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of the picture, the same on every machine."""

    @abstractmethod
    def size(self, index: int) -> int:
        """Size of the stored picture in bytes."""


def fingerprint(pictures: PictureSet) -> str:
    """SHA-256 of the sorted names and sizes (bytes); equal for equal sets, wherever they are stored."""
    digest = hashlib.sha256()
    for name, size in sorted((pictures.name(index), pictures.size(index)) for index in range(len(pictures))):
        digest.update(os.fsencode(name) + b"\0" + str(size).encode() + b"\n")
    return digest.hexdigest()


class StoredSet(PictureSet):
    """Encoded pictures, read on access, by as many threads as `readers` at the same time.

    Args:
        names: of the pictures, with forward slashes.
        crop: CenterCrop or TrainingCrop, which cuts an image from an upright RGB picture.
    """

    readers = 16

    def __init__(self, names: Iterable[str], crop: "CenterCrop | TrainingCrop", split: str) -> None:
        self.names, self.prepare, self.split = Names(names), crop, split
        self.resize, self.crop = crop.resize, crop.crop

    @abstractmethod
    def load(self, index: int, suffices: Suffices | None = None) -> Image.Image:
        """The picture, upright and RGB; `suffices` as in `load_picture`. Raises BrokenImage."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The stored bytes. Raises OSError."""

    @abstractmethod
    def tail(self, index: int) -> bytes:
        """The last TAIL bytes, or all if there are fewer. Raises OSError."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Location of the picture on this machine, for messages."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return scale_pixels(self.pixels(index))

    def pixels(self, index: int) -> Tensor:
        picture = self.load(index, self.prepare.suffices)
        try:
            return self.prepare(picture)
        except BrokenImage as error:
            raise BrokenImage(f"{self.place(index)}: {error}") from error

    def whole(self, index: int) -> Image.Image:
        return self.load(index)

    def name(self, index: int) -> str:
        return self.names[index]


class Names:
    """Many strings in two arrays that worker processes share. Each worker would soon have its own copy of a million string objects."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


class FileSet(StoredSet):
    """Picture files: `names` are relative to the folder `root`. See StoredSet."""

    def __init__(self, root: Path, names: Iterable[str], crop: "CenterCrop | TrainingCrop", split: str) -> None:
        super().__init__(names, crop, split)
        self.root = root

    def load(self, index: int, suffices: Suffices | None = None) -> Image.Image:
        return load_picture(self.root / self.names[index], suffices=suffices)

    def content(self, index: int) -> bytes:
        with open_regular(self.root / self.names[index]) as file:
            return file.read()

    def tail(self, index: int) -> bytes:
        with open_regular(self.root / self.names[index]) as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read()

    def place(self, index: int) -> str:
        return str(self.root / self.names[index])

    def size(self, index: int) -> int:
        try:
            return (self.root / self.names[index]).stat().st_size
        except OSError:  # a broken link counts as a broken picture, which an evaluation may skip
            return 0


def written(size: Size) -> str:
    height, width = sides(size)
    return f"{height} x {width}"


def resizing(size: Size) -> str:
    """What `resize_shorter` does."""
    height, width = sides(size)
    return f"shorter side to {height}" if height == width else f"to cover {written(size)}"


class CenterCrop:
    """Resizes the shorter side to `size`, or to cover a height and width, and crops the centre, as in evaluation."""

    suffices: Suffices | None = None

    def __init__(self, size: Size) -> None:
        self.size = size
        self.resize, self.crop = resizing(size), f"centre {written(size)}"

    def __call__(self, picture: Image.Image) -> Tensor:
        """uint8 (3, height, width). Raises BrokenImage."""
        return to_pixels(center_crop(resize_shorter(picture, self.size), self.size))


class Whole(CenterCrop):
    """Leaves pictures as they are, each in its own size, for evaluation one by one."""

    def __init__(self) -> None:
        self.resize, self.crop = "none", "none"

    def __call__(self, picture: Image.Image) -> Tensor:
        return to_pixels(picture)


class TrainingCrop:
    """Cuts a training image from a picture, with torch's random numbers.

    Args:
        size: pixels; the words below are for squares, and other shapes are cut likewise, with an aspect ratio relative to theirs.
        cut: `resized` takes a window with an aspect ratio between 3/4 and 4/3 and resizes it to `size`. `fast` does the same with
            torch's resize, which takes six tenths of the time of Pillow's and differs by 1 of 255 in some values, by 2 on hard edges.
            Large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where every window still has `size` pixels.
            `plain` takes a square after resizing the shorter side to `size`. `native` takes a square with a side between `size` and the
            whole shorter side, with equal probability for each octave, and resizes it to `size`, so that pixels are not enlarged unless
            the picture is too small. These four flip half of the squares.
            `center` is CenterCrop, as in evaluation and in the training of the published models, without randomness.
        scale: share of the picture's area that the window covers, lower and upper bound; only for `resized` and `fast`.
    """

    def __init__(self, size: Size, cut: Cut, scale: tuple[float, float] = (1.0, 1.0)) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"data.scale {list(scale)}: give two shares of the area, lower then upper, in (0, 1]")
        self.size, self.cut = size, cut
        height, width = sides(size)
        self._center, self._part = CenterCrop(size), v2.RandomCrop((height, width))
        ratio = (3 / 4 * width / height, 4 / 3 * width / height)
        self.window = v2.RandomResizedCrop((height, width), scale, ratio, interpolation=RESAMPLING, antialias=True)
        windowed = f"{scale[0]} to {scale[1]} of the area to {written(size)}"
        kept = f"squares of {height} pixels" if height == width else f"parts of {written(size)} pixels"
        resized = {"resized": windowed, "fast": windowed, "native": f"{kept} or more to {written(size)}"}
        self.resize = resized.get(cut, self._center.resize)
        self.crop = self._center.crop if cut == "center" else "random, random flip"
        self.suffices = self._smallest if cut == "fast" else None

    def __call__(self, picture: Image.Image) -> Tensor:
        """uint8 (3, height, width). Raises BrokenImage."""
        if self.cut == "center":
            return self._center(picture)
        if self.cut == "native":
            length, present = closest_side(picture, self.size)
            pixels = to_pixels(self._part(resize_by(picture, _between(length, present), present)))
        elif self.cut == "fast":
            pixels = self.window(to_pixels(picture))
        else:
            pixels = to_pixels(self.window(picture) if self.cut == "resized" else self._part(resize_shorter(picture, self.size)))
        return pixels.flip(2) if torch.rand(()) < 0.5 else pixels

    def _smallest(self, width: int, height: int) -> tuple[int, int]:
        """The smallest size of a picture of this width and height with no window smaller than `size`."""
        area, (narrowest, widest) = self.window.scale[0] * width * height, self.window.ratio
        least_width = min(math.sqrt(area * narrowest), width, height * narrowest)
        least_height = min(math.sqrt(area / widest), height, width / widest)
        wanted_height, wanted_width = sides(self.size)
        factor = max(wanted_width / least_width, wanted_height / least_height)
        return math.ceil(width * factor), math.ceil(height * factor)


def _between(least: int, present: int) -> int:
    """A random length between the two, each octave equally likely; `least` if it is not the smaller one."""
    return least if present <= least else round(present * (least / present) ** float(torch.rand(())))

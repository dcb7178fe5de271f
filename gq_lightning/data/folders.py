"""Folders of pictures: ImageNet's layout, and any other."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np

from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.data.sets import CenterCrop, Cut, FileSet, PictureSet, TrainingCrop
from gq_lightning.errors import UserError


class ImageNet(ImageDataModule):
    """ImageNet-1k as it is usually unpacked: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG`` or ``val/*.JPEG``.

    Evaluation: shorter side to image_size, centre crop (arXiv 2512.06609, section 4: the 50 000 validation images at 256).

    Args:
        root: folder with the folders train and val.
        crop: training crops, `resized` (a share of the area, resized), `fast` (the same, resized by torch, some values a little off),
            `native` (a square, never enlarged), `plain` (a square after the shorter side is resized) or `center` (as in
            evaluation: the published training).
        scale: share of the area that a resized or fast crop covers, lower and upper bound.
        image_size: side of the square images in pixels.
        batch_size: images in a training batch, on each device.
        evaluation_batch_size: images in an evaluation batch; null takes batch_size.
        workers: processes that read pictures, at most one a core.
        skip_broken: evaluate without the pictures that cannot be read, instead of stopping at the first.
        max_broken: stop training when more than this share of the pictures drawn so far could not be read.
    """

    def __init__(
        self,
        root: str,
        crop: Cut = "resized",
        scale: tuple[float, float] = (0.8, 1.0),
        image_size: int = 256,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        workers: int = 4,
        skip_broken: bool = False,
        max_broken: float = 0.2,
    ) -> None:
        super().__init__(image_size, batch_size, evaluation_batch_size, workers, skip_broken, max_broken)
        self.root = Path(root).expanduser()
        self.training_crop = TrainingCrop(image_size, crop, scale)

    def prepare_data(self) -> None:
        """Lists the pictures, so that the other processes find an index."""
        _list(self.root / "train", self.root / "val")

    def training_set(self) -> PictureSet:
        return self._split("train", self.training_crop)

    def evaluation_set(self) -> PictureSet:
        return self._split("val", CenterCrop(self.image_size))

    def _split(self, split: str, crop: CenterCrop | TrainingCrop) -> PictureSet:
        folder = self.root / split
        return FileSet(folder, list_pictures(folder, "data.root must hold train/<wnid>/*.JPEG and val/"), crop, split)


class ImageFolder(ImageDataModule):
    """Any folder of pictures, searched recursively.

    Without a validation_root, a picture belongs to the validation split if a hash of its name relative to root says so. The split is
    the same on every machine and does not change when pictures are added, except in a folder so small that the picture with the
    lowest hash is the whole validation split.

    Args:
        root: the folder.
        validation_root: another folder, all of whose pictures are evaluated; null takes a share of root.
        validation_share: that share, between 0 and 1.
        crop: training crops, `resized` (a share of the area, resized), `fast` (the same, resized by torch, some values a little off),
            `native` (a square, never enlarged), `plain` (a square after the shorter side is resized) or `center` (as in
            evaluation: the published training).
        scale: share of the area that a resized or fast crop covers, lower and upper bound.
        image_size: side of the square images in pixels.
        batch_size: images in a training batch, on each device.
        evaluation_batch_size: images in an evaluation batch; null takes batch_size.
        workers: processes that read pictures, at most one a core.
        skip_broken: evaluate without the pictures that cannot be read, instead of stopping at the first.
        max_broken: stop training when more than this share of the pictures drawn so far could not be read.
    """

    def __init__(
        self,
        root: str,
        validation_root: str | None = None,
        validation_share: float = 0.05,
        crop: Cut = "resized",
        scale: tuple[float, float] = (0.8, 1.0),
        image_size: int = 256,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        workers: int = 4,
        skip_broken: bool = False,
        max_broken: float = 0.2,
    ) -> None:
        super().__init__(image_size, batch_size, evaluation_batch_size, workers, skip_broken, max_broken)
        if not 0 < validation_share < 1:
            raise UserError(f"data.validation_share {validation_share}: give a share between 0 and 1")
        self.root = Path(root).expanduser()
        self.validation_root = None if validation_root is None else Path(validation_root).expanduser()
        self.validation_share = validation_share
        self.training_crop = TrainingCrop(image_size, crop, scale)

    def prepare_data(self) -> None:
        """Lists the pictures, so that the other processes find an index."""
        _list(self.root, self.validation_root or self.root)

    def training_set(self) -> PictureSet:
        if self.validation_root is not None:
            return FileSet(self.root, self._names, self.training_crop, "training folder")
        if self._held_out.all():
            raise UserError(f"{self.root} has no pictures left to train on: add pictures or give data.validation_root")
        return FileSet(self.root, compress(self._names, ~self._held_out), self.training_crop, "training share of a folder")

    def evaluation_set(self) -> PictureSet:
        crop = CenterCrop(self.image_size)
        if self.validation_root is not None:
            names = list_pictures(self.validation_root, "data.validation_root must hold pictures")
            return FileSet(self.validation_root, names, crop, "validation folder")
        return FileSet(self.root, compress(self._names, self._held_out), crop, f"{self.validation_share:g} of a folder by hashed name")

    @cached_property
    def _names(self) -> list[str]:
        return list_pictures(self.root, "data.root must hold pictures")

    @cached_property
    def _held_out(self) -> np.ndarray:
        return held_out(self._names, self.validation_share)


def _list(*folders: Path) -> None:
    for folder in folders:
        with suppress(UserError):  # said where the pictures are asked for
            list_pictures(folder)


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Which of the pictures are the validation split (bool): about that share of them by their names, one at the least."""
    positions = np.array([position(name) for name in names])
    return positions <= max(share, positions.min())


def position(name: str) -> float:
    """A number in [0, 1) that looks uniform and depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

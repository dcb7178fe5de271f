"""Folders of pictures, in ImageNet's layout or any other."""

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.overlap import also_in
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.data.sets import CenterCrop, Cut, FileSet, PictureSet, StoredSet, TrainingCrop
from gq_lightning.errors import UserError, printable

logger = logging.getLogger("gq_lightning.data")


class StoredPictures(ImageDataModule):
    """Picture files below a root.

    Args:
        root: folder of the pictures.
        crop: training crops: `resized` (a share of the area, resized), `fast` (the same, resized by torch, with slightly different
            values), `native` (a part, never enlarged), `plain` (a part after the shorter side is resized) or `center` (as in
            evaluation and in the published training).
        scale: share of the area that a resized or fast crop covers, lower and upper bound.
    """

    def __init__(self, root: str, crop: Cut = "resized", scale: tuple[float, float] = (0.8, 1.0), **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser()
        self.training_crop = TrainingCrop(self.image_size, crop, scale)
        self.evaluation_crop = CenterCrop(self.image_size)


class ImageNet(StoredPictures):
    """ImageNet-1k in its usual layout: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG`` or ``val/*.JPEG``.

    In evaluation, the shorter side is resized to image_size and the centre is cropped (arXiv 2512.06609, section 4: the 50 000 validation
    images at 256).

    Args:
        root: folder with the folders train and val.
    """

    def __init__(self, root: str, **settings: Any) -> None:
        super().__init__(root, **settings)

    def prepare_data(self) -> None:
        """Lists the pictures, so that the other processes find the index."""
        _list(self.root / "train", self.root / "val")

    def training_set(self) -> PictureSet:
        return self._split("train", self.training_crop)

    def evaluation_set(self) -> PictureSet:
        return self._split("val", self.evaluation_crop)

    def _split(self, split: str, crop: CenterCrop | TrainingCrop) -> PictureSet:
        folder = self.root / split
        return FileSet(folder, list_pictures(folder, "data.root must hold train/<wnid>/*.JPEG and val/"), crop, split)


class SplitPictures(StoredPictures):
    """Pictures with a validation set, either a separate one or a share of the pictures.

    A hash of its name relative to root decides whether a picture belongs to the share. The split is the same on every machine and does
    not change when pictures are added, except in a set so small that the picture with the lowest hash is the whole share. Pictures with
    the same bytes as a validation picture are left out of training, wherever they are.

    Args:
        root: folder of the pictures.
        validation_share: share of the pictures used for validation, between 0 and 1, if there is no separate validation set.
    """

    kind: str  # names in messages, singular and plural
    kinds: str

    def __init__(self, root: str, validation_share: float = 0.05, **settings: Any) -> None:
        super().__init__(root, **settings)
        if not 0 < validation_share < 1:
            raise UserError(f"data.validation_share {validation_share}: give a share between 0 and 1")
        self.validation_share = validation_share

    @abstractmethod
    def all_names(self) -> Sequence[str]:
        """Names of the pictures to train on, or to split."""

    @abstractmethod
    def some(self, chosen: np.ndarray, crop: CenterCrop | TrainingCrop, split: str) -> StoredSet:
        """The pictures of `all_names` for which `chosen` (bool) is true."""

    @abstractmethod
    def separate(self, crop: CenterCrop, split: str) -> StoredSet | None:
        """The pictures of the separate validation set, or None."""

    def training_set(self) -> PictureSet:
        apart, evaluated = self._apart is not None, self.evaluation_set()
        split = f"training {self.kind}" if apart else f"training share of {self.kinds}"
        chosen = np.ones(len(self.all_names()), dtype=bool) if apart else ~self._held_out
        shared = np.zeros(chosen.sum(), dtype=bool)
        if self.trainer is None or self.trainer.is_global_zero:
            shared = also_in(self.some(chosen, self.training_crop, split), evaluated)
        if self.trainer is not None:  # if a file were unreadable on one rank only, the ranks would train on different sets
            shared = self.trainer.strategy.broadcast(shared)
        if shared.any():
            said = f"{shared.sum()} of {len(shared)} pictures are left out of training, because they are validation pictures"
            logger.warning("%s: %s", printable(self.root), said)
            chosen[np.flatnonzero(chosen)[shared]] = False
        if not chosen.any():
            raise UserError(f"{self.root} has no pictures left to train on besides the validation pictures: add some, or change those")
        return self.some(chosen, self.training_crop, split)

    def evaluation_set(self) -> StoredSet:
        share = f"{self.validation_share:g} of {self.kinds} by hashed name"
        return self._apart or self.some(self._held_out, self.evaluation_crop, share)

    @cached_property
    def _apart(self) -> StoredSet | None:
        return self.separate(self.evaluation_crop, f"validation {self.kind}")

    @cached_property
    def _held_out(self) -> np.ndarray:
        return held_out(self.all_names(), self.validation_share)


class ImageFolder(SplitPictures):
    """Any folder of pictures, searched recursively.

    Args:
        root: the folder.
        validation_root: separate folder of validation pictures; null takes a share of root.
    """

    kind, kinds = "folder", "a folder"

    def __init__(self, root: str, validation_root: str | None = None, **settings: Any) -> None:
        super().__init__(root, **settings)
        self.validation_root = None if validation_root is None else Path(validation_root).expanduser()

    def prepare_data(self) -> None:
        """Lists the pictures, so that the other processes find the index."""
        _list(self.root, self.validation_root or self.root)

    def all_names(self) -> Sequence[str]:
        return self._names

    def some(self, chosen: np.ndarray, crop: CenterCrop | TrainingCrop, split: str) -> StoredSet:
        return FileSet(self.root, compress(self._names, chosen), crop, split)

    def separate(self, crop: CenterCrop, split: str) -> StoredSet | None:
        if (folder := self.validation_root) is None:
            return None
        return FileSet(folder, list_pictures(folder, "data.validation_root must hold pictures"), crop, split)

    @cached_property
    def _names(self) -> list[str]:
        return list_pictures(self.root, "data.root must hold pictures")


def _list(*folders: Path) -> None:
    for folder in folders:
        with suppress(UserError):  # reported when the pictures are used
            list_pictures(folder)


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Which pictures form the validation split (bool): about this share of them, by name, and at least one."""
    positions = np.array([position(name) for name in names])
    return positions <= max(share, positions.min())


def position(name: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

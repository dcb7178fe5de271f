"""Lightning data modules of images for training and evaluation, and the reading of picture files."""

from importlib import import_module
from typing import TYPE_CHECKING

from gq_lightning.construction import Size, shortened, sides, spelled
from gq_lightning.data.pictures.listing import PICTURE_SUFFIXES, find_pictures
from gq_lightning.data.pictures.reading import (
    BrokenImage,
    center_crop,
    load_picture,
    resize_shorter,
    to_picture,
    to_tensor,
)

if TYPE_CHECKING:
    from gq_lightning.data.downloads import CIFAR10, Imagenette
    from gq_lightning.data.folders import ImageFolder, ImageNet
    from gq_lightning.data.module import ImageDataModule
    from gq_lightning.data.photographs import Photographs
    from gq_lightning.data.sets import PictureSet
    from gq_lightning.data.shards.module import Shards

__all__ = [
    "CIFAR10",
    "PICTURE_SUFFIXES",
    "BrokenImage",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "Imagenette",
    "Photographs",
    "PictureSet",
    "Shards",
    "Size",
    "center_crop",
    "find_pictures",
    "load_picture",
    "resize_shorter",
    "shortened",
    "sides",
    "spelled",
    "to_picture",
    "to_tensor",
]


def __getattr__(name: str) -> object:
    # importing these imports Lightning; all are imported together, since the command line finds only classes that are imported
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    files = [import_module(f"{__name__}.{file}") for file in ("downloads", "folders", "module", "photographs", "sets", "shards.module")]
    return next(getattr(file, name) for file in files if hasattr(file, name))

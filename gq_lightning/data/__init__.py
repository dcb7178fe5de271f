"""Images to train on and to measure with, all of them data modules for Lightning, and the reading of picture files."""

from gq_lightning.data.downloads import CIFAR10, Imagenette
from gq_lightning.data.folders import ImageFolder, ImageNet
from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.photographs import Photographs
from gq_lightning.data.pictures.listing import PICTURE_SUFFIXES, find_pictures
from gq_lightning.data.pictures.reading import (
    BrokenImage,
    center_crop,
    load_picture,
    resize_shorter,
    to_picture,
    to_tensor,
)
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
    "center_crop",
    "find_pictures",
    "load_picture",
    "resize_shorter",
    "to_picture",
    "to_tensor",
]

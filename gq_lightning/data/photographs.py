"""Photographs installed with scikit-image and scikit-learn, for training without a download."""

from importlib.resources import as_file, files
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gq_lightning.construction import Size, sides
from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.pictures.reading import BrokenImage, load_picture, resize_shorter, scale_pixels, to_pixels
from gq_lightning.data.sets import PictureSet, written
from gq_lightning.errors import UserError

SCIKIT_IMAGE, SCIKIT_LEARN = ("skimage", "data"), ("sklearn", "datasets/images")
HELD_OUT = {"chelsea.png": SCIKIT_IMAGE, "rocket.jpg": SCIKIT_IMAGE, "china.jpg": SCIKIT_LEARN}
TRAINING = dict.fromkeys(
    (
        *("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
        *("brick.png", "camera.png", "cell.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png", "moon.png"),
        *("page.png", "text.png"),
    ),
    SCIKIT_IMAGE,
) | {"flower.jpg": SCIKIT_LEARN}
EVALUATED_SIDE = 256  # pixels of the held-out photographs' shorter side
SCALES = (2.5, 4.0, 6.0)  # shorter sides in training, in image sizes
LARGEST_ENLARGEMENT = 1.25


class Photographs(ImageDataModule):
    """21 photographs, colour and grey, that are installed with scikit-image and scikit-learn.

    Three are held out, a cat, a rocket and a temple (chelsea, rocket, china). Their shorter side is resized to 256 pixels, or to the
    longer side of image_size if that is larger, and they are cut into a grid from the upper left: 64 squares of 64 pixels. Training uses
    random crops of the other 18, at up to three scales each. The other images of the two packages are not photographs and have different
    statistics: the logo, the phantom, the chessboards, the colour wheel, the horse's silhouette, the disparity map, the tiny animations;
    microaneurysms.png is 102 pixels wide and a part of retina.jpg.

    Args:
        image_size: of the images in pixels, the side of squares or [height, width].
        batch_size: images in a training batch, on each device.
        workers: processes that cut crops, at most one per core; the main process cuts thousands of 64-pixel crops a second.
        crops_per_epoch: training crops in an epoch.
        augment: in addition to flips, randomly transpose squares, permute colours, invert, and change the contrast of training crops. The
            18 photographs have few colours, and the tokenizer must reconstruct others.
    """

    def __init__(
        self,
        image_size: Size = 64,
        batch_size: int = 32,
        workers: int = 0,
        crops_per_epoch: int = 8192,
        augment: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, workers=workers, **settings)
        if crops_per_epoch < 1:
            raise UserError(f"data.crops_per_epoch {crops_per_epoch}: give a positive number")
        self.crops_per_epoch, self.augment = crops_per_epoch, augment

    def training_set(self) -> PictureSet:
        return RandomCrops(self.image_size, self.crops_per_epoch, self.augment)

    def evaluation_set(self) -> PictureSet:
        return GridCrops(self.image_size)


class GridCrops(PictureSet):
    """The held-out photographs, cut row by row."""

    def __init__(self, size: Size) -> None:
        height, width = sides(size)
        side = max(EVALUATED_SIDE, height, width)
        self.split, self.resize, self.crop = "held-out photographs", f"shorter side to {side}", f"grid of {written(size)}"
        self.names, crops = [], []
        self.bytes: list[int] = []
        for name in HELD_OUT:
            picture, stored = _load(name)
            parts = to_pixels(resize_shorter(picture, side)).contiguous().unfold(1, height, height).unfold(2, width, width)
            rows, columns = parts.shape[1:3]
            crops.append(parts.permute(1, 2, 0, 3, 4).flatten(0, 1))
            self.names += [f"{name}/{row}-{column}" for row in range(rows) for column in range(columns)]
            self.bytes += [stored] * (rows * columns)
        self.crops = torch.cat(crops)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Tensor:
        return scale_pixels(self.crops[index])

    def whole(self, index: int) -> Image.Image:
        return _load(self.names[index].rpartition("/")[0])[0]

    def name(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> int:
        return self.bytes[index]


class RandomCrops(PictureSet):
    """`count` random crops, flipped and augmented. Items are drawn from torch's random numbers; the index does not matter."""

    def __init__(self, size: Size, count: int, augment: bool = False) -> None:
        self.sides, self.count, self.augment = sides(size), count, augment
        self.split, self.resize, self.crop = "training photographs", "several scales", "random, random flip"
        largest, pictures = max(self.sides), [picture for picture, _ in map(_load, TRAINING)]
        self.photographs = [to_pixels(resize_shorter(picture, side)) for picture in pictures for side in _scales(picture, largest)]
        if not self.photographs:
            raise UserError(f"data.image_size {size} is larger than all photographs: lower it, or use another data set")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        photograph = self.photographs[_below(len(self.photographs))]
        height, width = self.sides
        top, left = (_below(whole - part + 1) for whole, part in zip(photograph.shape[1:], self.sides, strict=True))
        crop = photograph[:, top : top + height, left : left + width]
        image = scale_pixels(crop.flip(2) if _below(2) else crop)
        return _augmented(image) if self.augment else image

    def name(self, index: int) -> str:
        return f"crop-{index}"

    def size(self, index: int) -> int:
        return 3 * self.sides[0] * self.sides[1]


def _augmented(image: Tensor) -> Tensor:
    """Applies each change with probability 1/2: vertical flip, transposition of a square, colour permutation, inversion, contrast and
    brightness."""
    if _below(2):
        image = image.flip(1)
    if _below(2) and image.shape[1] == image.shape[2]:
        image = image.transpose(1, 2)
    if _below(2):
        image = image[torch.randperm(3)]
    if _below(2):
        image = -image
    if _below(2):
        contrast, brightness, mean = 0.5 + torch.rand(()), 0.3 * torch.randn(()), image.mean()
        image = (mean + contrast * (image - mean) + brightness).clamp(-1, 1)
    return image.contiguous()


def _scales(picture: Image.Image, size: int) -> list[int]:
    """The shorter sides to which a photograph is resized for training crops of `size` pixels; empty if it is far too small."""
    limit = min(picture.size) * LARGEST_ENLARGEMENT
    if size > limit:
        return []
    return [side for side in (round(scale * size) for scale in SCALES) if side <= limit] or [max(size, min(picture.size))]


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))


def _load(name: str) -> tuple[Image.Image, int]:
    """The installed photograph and the size of its file in bytes. The packages' own loaders might download."""
    package, folder = (HELD_OUT | TRAINING)[name]
    try:
        with as_file(files(package).joinpath(folder, name)) as path:
            return load_picture(path), path.stat().st_size
    except (ModuleNotFoundError, FileNotFoundError, BrokenImage) as error:
        wanted = "scikit-image" if package == "skimage" else "scikit-learn"
        raise UserError(f"the installed {wanted} lacks {name} ({error}): install or upgrade {wanted}") from error

"""Data sets that torchvision downloads and verifies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torchvision import datasets

from gq_lightning.construction import Size
from gq_lightning.data.folders import StoredPictures
from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.data.pictures.reading import scale_pixels
from gq_lightning.data.sets import CenterCrop, FileSet, PictureSet, TrainingCrop
from gq_lightning.errors import UserError


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50 000 training and 10 000 test photographs of 32 x 32 pixels (Krizhevsky 2009), 170 MB to download.

    Args:
        root: folder for the download.
        image_size: of the images in pixels, the side of squares or [height, width]; pictures are resized if it is not 32.
        batch_size: images in a training batch, on each device.
        workers: processes that read pictures, at most one per core.
    """

    def __init__(self, root: str, image_size: Size = 32, batch_size: int = 128, workers: int = 2, **settings: Any) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, workers=workers, **settings)
        self.root = Path(root).expanduser()

    def prepare_data(self) -> None:
        """Downloads the data set if it is missing. Raises UserError if that fails."""
        _download("CIFAR-10", self.root, lambda: datasets.CIFAR10(self.root, download=True))

    def training_set(self) -> PictureSet:
        return CIFARSet(self.root, "train", TrainingCrop(self.image_size, "plain"))

    def evaluation_set(self) -> PictureSet:
        return CIFARSet(self.root, "test", CenterCrop(self.image_size))


class CIFARSet(PictureSet):
    """One split of CIFAR-10, in memory (150 MB for training)."""

    def __init__(self, root: Path, split: Literal["train", "test"], crop: CenterCrop | TrainingCrop) -> None:
        try:
            self.images: Any = datasets.CIFAR10(root, train=split == "train")
        except RuntimeError as error:
            raise UserError(f"{root}: CIFAR-10 is missing or damaged: call prepare_data, which downloads it there") from error
        self.split, self.prepare, self.resize, self.crop = split, crop, crop.resize, crop.crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return scale_pixels(self.prepare(self.images[index][0]))

    def name(self, index: int) -> str:
        return f"{self.split}/{index:05d}"

    def size(self, index: int) -> int:
        return self.images.data[index].nbytes


class Imagenette(StoredPictures):
    """Imagenette, ten classes of ImageNet: 9 469 training and 3 925 validation photographs, github.com/fastai/imagenette.

    Args:
        root: folder for the download.
        variant: shorter side of the downloaded pictures: `160px` (99 MB), `320px` (341 MB) or `full` (1.6 GB).
    """

    def __init__(self, root: str, variant: Literal["160px", "320px", "full"] = "320px", **settings: Any) -> None:
        super().__init__(root, **settings)
        self.variant = variant

    def prepare_data(self) -> None:
        """Downloads and unpacks the data set if it is missing. Raises UserError if that fails."""
        _download("Imagenette", self.root, lambda: datasets.Imagenette(self.root, size=self.variant, download=True))

    def training_set(self) -> PictureSet:
        return self._split("train", self.training_crop)

    def evaluation_set(self) -> PictureSet:
        return self._split("val", self.evaluation_crop)

    def _split(self, split: str, crop: CenterCrop | TrainingCrop) -> PictureSet:
        # torchvision's name for the unpacked archive
        folder = self.root / f"imagenette2{'' if self.variant == 'full' else '-' + self.variant.removesuffix('px')}" / split
        names = list_pictures(folder, "call prepare_data, which downloads Imagenette there, or delete a partial download")
        return FileSet(folder, names, crop, f"{self.variant}/{split}")


def _download(name: str, root: Path, download: Callable[[], object]) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        download()
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(f"cannot download {name} to {root}: {reason}; check the network, or put the archive or its folder there") from error

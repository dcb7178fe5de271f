"""Measures generated pictures against a reference: a folder of pictures, or an .npz file of pictures or statistics in ADM's format."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from gq_lightning.data.module import ImageDataModule
from gq_lightning.data.pictures.listing import list_pictures
from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.pictures.reading import BrokenImage, load_picture
from gq_lightning.data.sets import CenterCrop, FileSet, PictureSet
from gq_lightning.errors import UserError
from gq_lightning.evaluation.archive import Archive
from gq_lightning.evaluation.evaluate import SHEET, TOLD
from gq_lightning.metrics.generation import NUMBERS, Seen, generation_metrics, protocol, see
from gq_lightning.metrics.reconstruction import to_255


class Exactly(CenterCrop):
    """Pictures that already have the size."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.resize, self.crop = "none", "none"

    def __call__(self, picture: Image.Image) -> Tensor:
        if picture.size != (self.size, self.size):
            found = f"{picture.height}x{picture.width}, but the first picture has {self.size}x{self.size}"
            raise BrokenImage(f"{found}: give square pictures of one size")
        return super().__call__(picture)


class Pictures(ImageDataModule):
    """The pictures of a folder, in order, without the contact sheet of `generate`."""

    def __init__(self, folder: Path, names: Sequence[str], crop: CenterCrop, **options: Any) -> None:
        super().__init__(crop.size, **options)
        self.set = FileSet(folder, names, crop, "all")

    def training_set(self) -> PictureSet:
        return self.set

    def evaluation_set(self) -> PictureSet:
        return self.set


@dataclass(frozen=True)
class Source:
    """Pictures to measure: `count` squares of `size` pixels at `name`.

    Attributes:
        batches: makes batches (B, 3, size, size) on the scale 0..255.
        told: description for JSON, without machine paths; complete when all batches have been read.
    """

    name: Path
    size: int
    count: int
    batches: Callable[[], Iterator[Tensor]]
    told: Callable[[], dict[str, Any]]


def evaluate_generated(
    generated: Path, reference: Path, device: torch.device, **options: Any
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """The metrics, their protocol, and a description of the pictures. Raises UserError if there are fewer than two pictures, sizes differ,
    or a file is broken.

    Args:
        generated: folder of square pictures of one size, or an .npz file of them.
        reference: the same, or an .npz file with statistics. The pictures of a folder are resized and cropped to the generated ones.
    """
    ours = _source(generated, None, **options)
    archive = Archive(reference) if reference.suffix == ".npz" else None
    pooled, spatial = archive.moments() if archive is not None else (None, None)
    with_pictures = archive is None or archive.shape is not None
    theirs = _source(reference, ours.size, **options) if with_pictures else None
    seen, other = _see(ours, device), _see(theirs, device, cached=True) if theirs is not None else None
    if pooled is not None:  # of more pictures than the file has
        other = Seen(None if other is None else other.pooled, pooled, spatial)
    assert other is not None  # an archive without pictures has statistics
    values, left_out = generation_metrics(seen, other)
    told = {"generated": ours.told(), "reference": ({} if theirs is None else theirs.told()) | {"published_statistics": pooled is not None}}
    return values, protocol(left_out), told


def generation_table(values: Mapping[str, float], title: str) -> Table:
    table = Table("metric", "value", title=title, title_justify="left")
    for number in NUMBERS:
        table.add_row(number.heading, number.show(values[number.name]) if number.name in values else "-")
    return table


def _source(path: Path, size: int | None, **options: Any) -> Source:
    """The pictures at a path, of the given size, or all of one size."""
    if path.suffix == ".npz":
        archive = Archive(path)
        if archive.shape is None:
            raise UserError(f"--generated {path}: has statistics but no pictures (arr_0): give pictures")
        count, height, width = archive.shape
        _check_size(path, height, width, size)
        told = {"data": "arr_0", "images": count, "image_size": height}
        return Source(path, height, count, lambda: (batch.float() for batch in archive.batches(options["batch_size"])), lambda: told)
    crop: CenterCrop
    names = [name for name in list_pictures(path) if name != SHEET or not (path / TOLD).exists()]
    if size is None and names:
        first = load_picture(path / names[0])
        _check_size(path / names[0], first.height, first.width, None)
        side, crop = first.width, Exactly(first.width)
    else:
        side = size or 1
        crop = CenterCrop(side)
    module = Pictures(path, names, crop, **options)
    return Source(path, side, len(names), lambda: map(to_255, module.test_dataloader()), module.protocol)


def _check_size(path: Path, height: int, width: int, size: int | None) -> None:
    if height != width or size not in (None, height):
        wanted = "square ones" if size is None else f"{size}x{size}, like the generated ones"
        raise UserError(f"{path}: pictures of {height}x{width}: give {wanted}")


def _see(source: Source, device: torch.device, cached: bool = False) -> Seen:
    if source.count < 2:
        raise UserError(f"{source.name}: {source.count} pictures are too few: give at least 2, better thousands")
    with progress(f"measuring {source.name}, pictures", source.count) as advance:

        def counted() -> Iterator[Tensor]:
            for batch in source.batches():
                if len(batch):
                    yield batch
                    advance(len(batch))

        seen = see(counted(), device, cached)
    if seen is None:
        raise UserError(f"{source.name}: fewer than 2 of the {source.count} pictures can be read: give others (see the warnings)")
    return seen

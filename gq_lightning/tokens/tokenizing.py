"""Pictures to a token set.

PictureSet --Seen--> views (v, 3, H, W) --tokenizer.encode--> records (label, tokens) --whole files--> OUT/000000.npy, ..., OUT/set.json

A shard has the same pictures in the same batches for any number of ranks. Finished shards are skipped by the next call.
"""

import copy
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gq_lightning.construction import Size, sides
from gq_lightning.data.module import cores
from gq_lightning.data.order import derived_seed, random_numbers
from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.pictures.reading import INTERPOLATION, BrokenImage, center_crop, resize_shorter, to_pixels
from gq_lightning.data.sets import CenterCrop, PictureSet, resizing, written
from gq_lightning.data.sets import fingerprint as fingerprint_of
from gq_lightning.distributed import rank, ranks, wait_for_all
from gq_lightning.errors import UserError, printable
from gq_lightning.files import write_whole
from gq_lightning.tokens.codec import Tokenizer, check_size
from gq_lightning.tokens.token_set import NO_CLASS, Header, TokenSet, Told, read_told, sha256_of, shard_path

logger = logging.getLogger("gq_lightning.data")

Views = Literal["one", "flip", "ten_crop"]
LARGER = 1.1  # shorter side from which ten crops are cut, in image sizes


class TenCrop(CenterCrop):
    """The centre and the four corners of a picture that is a tenth larger, each followed by its mirror image: (10, 3, height, width)."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        height, width = (round(LARGER * side) for side in sides(size))
        self.larger = (height, width)
        self.resize, self.crop = resizing(self.larger), f"centre and corners {written(size)}"

    def __call__(self, picture: Any) -> Tensor:
        (height, width), picture = sides(self.size), resize_shorter(picture, self.larger)
        corners = [picture.crop((x, y, x + width, y + height)) for y in (0, picture.height - height) for x in (0, picture.width - width)]
        return torch.stack([view for crop in (center_crop(picture, self.size), *corners) for view in _with_mirror(to_pixels(crop))])


class Seen(Dataset[Tensor | BrokenImage]):
    """The views of each picture, (v, 3, H, W); for a broken picture, its error.

    Picture files are cropped as in evaluation, or into ten crops. Pictures that are already crops are used unchanged.
    """

    def __init__(self, pictures: PictureSet, size: Size, views: Views) -> None:
        self.mirrored = views == "flip"
        self.names = {"one": ["centre"], "flip": ["centre", "mirrored"]}.get(views) or [
            f"{place}{mirror}"
            for place in ("centre", "upper left", "upper right", "lower left", "lower right")
            for mirror in ("", ", mirrored")
        ]
        cuts = hasattr(pictures, "prepare")
        if not cuts and views == "ten_crop":
            raise UserError(f"--views ten_crop: the pictures of {pictures.split} are crops already: use flip")
        crop = TenCrop(size) if views == "ten_crop" else CenterCrop(size)
        self.preparation = f"{crop.resize}, {crop.crop}, {INTERPOLATION}" if cuts else f"{pictures.resize}, {pictures.crop}"
        if cuts:
            pictures = copy.copy(pictures)
            pictures.prepare = crop  # type: ignore[attr-defined]
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor | BrokenImage:
        try:
            with random_numbers(derived_seed(index)):
                image = self.pictures[index]
        except BrokenImage as error:
            return error
        if image.ndim == 4:
            return image
        return torch.stack(_with_mirror(image) if self.mirrored else [image])


def class_names(pictures: PictureSet) -> list[str]:
    """The first folders in the pictures' names, sorted; empty if there are fewer than two."""
    names = sorted({_folder(pictures.name(index)) for index in range(len(pictures))})
    return names if len(names) > 1 else []


def write_token_set(
    tokenizer: Tokenizer,
    pictures: PictureSet,
    out: Path,
    image_size: Size,
    classes: Sequence[str] = (),
    views: Views = "one",
    batch_size: int = 32,
    workers: int = 2,
    shard_pictures: int = 4096,
) -> TokenSet:
    """Writes the set, or its missing shards. With torch.distributed, each rank writes its share of the shards.

    Broken pictures are named in a warning and left out. Raises UserError if no picture can be read, `out` has other tokens, or `out` cannot
    be written.

    Args:
        image_size: of the images in pixels, the side of squares or (height, width).
        classes: names of the classes, see `class_names`; a picture of another class gets no label.
        views: `one` is the picture as in evaluation; `flip` adds its mirror image; `ten_crop` is centre and corners, mirrored too.
        shard_pictures: pictures in a shard, which is the most that a kill loses.
    """
    for name, value in (("batch_size", batch_size), ("shard_pictures", shard_pictures)):
        if value < 1:
            raise UserError(f"--{name} {value}: give a positive number")
    seen, (height, width) = Seen(pictures, image_size, views), sides(image_size)
    check_size(tokenizer, "data.init_args.image_size", image_size)
    grid = (height // tokenizer.downsampling, width // tokenizer.downsampling, tokenizer.tokens_per_position)
    geometry = (grid, tokenizer.codebook_size, tokenizer.downsampling, tokenizer.tokens_fingerprint)
    header = Header(*geometry, list(classes), seen.names, seen.preparation, pictures.split, [], {})
    plan = hashlib.sha256(f"{header} {fingerprint_of(pictures)} {shard_pictures}".encode("utf-8", "surrogateescape")).hexdigest()
    shards = [range(begin, min(begin + shard_pictures, len(seen))) for begin in range(0, len(seen), shard_pictures)]
    mine = range(rank(), len(shards), ranks())
    done = {number for number in mine if _is_done(out, number, plan, header)}
    batches = [
        list(shards[number][begin : begin + batch_size])
        for number in mine
        if number not in done
        for begin in range(0, len(shards[number]), batch_size)
    ]
    loader = DataLoader(seen, batch_sampler=batches, num_workers=min(workers, cores()), collate_fn=list, generator=torch.Generator())
    contents = iter(loader)  # starts the workers before the bar, whose thread they must not inherit
    with progress(f"writing {out}, pictures", sum(len(shards[number]) for number in mine)) as advance:
        for number in mine:
            if number in done:
                advance(len(shards[number]))
            else:
                _write_shard(tokenizer, seen, shards[number], batch_size, header, plan, shard_path(out, number, "npy"), contents, advance)
    wait_for_all()
    if rank() == 0:
        _finish(out, header, len(shards))
    wait_for_all()
    return TokenSet(out, verify=False)


def _write_shard(
    tokenizer: Tokenizer,
    seen: Seen,
    indices: range,
    batch_size: int,
    header: Header,
    plan: str,
    path: Path,
    contents: Iterator[list[Tensor | BrokenImage]],
    advance: Callable[[int], None],
) -> None:
    """Encodes the next pictures of `contents` to a shard and writes its two files; the second marks it as finished."""
    labels = {name: label for label, name in enumerate(header.classes)}
    rows, names, left_out = [np.empty(0, header.record)], [], {}
    for begin in range(0, len(indices), batch_size):
        images, batch = [], indices[begin : begin + batch_size]
        for index, item in zip(batch, next(contents), strict=True):
            name = seen.pictures.name(index)
            if isinstance(item, BrokenImage):
                logger.warning("left out a broken picture: %s", item)
                left_out[name] = printable(item)
            else:
                images.append(item)
                names.append(name)
        if images:
            tokens = tokenizer.encode(torch.cat(images)).cpu().numpy()
            records = np.empty(len(images), header.record)
            records["tokens"] = tokens.reshape(len(images), -1, *tokens.shape[1:])
            records["label"] = [labels.get(_folder(name), NO_CLASS) for name in names[-len(images) :]]
            rows.append(records)
        advance(len(batch))
    array = io.BytesIO()
    np.save(array, np.concatenate(rows), allow_pickle=False)
    write_whole(path, array.getvalue())
    told = Told(plan, hashlib.sha256(array.getvalue()).hexdigest(), names, left_out)
    write_whole(path.with_suffix(".json"), json.dumps(told._asdict()).encode("ascii"))


def _is_done(out: Path, number: int, plan: str, header: Header) -> bool:
    """Whether this shard is finished. Raises UserError if it holds other tokens than planned."""
    path = shard_path(out, number, "json")
    try:
        told = read_told(path)
    except (OSError, ValueError):
        return False
    if told.plan != plan:
        raise UserError(f"{path}: holds tokens of other pictures or options: choose another --out, or delete that folder")
    array = path.with_suffix(".npy")
    return array.is_file() and sha256_of(array) == told.sha256


def _finish(out: Path, header: Header, count: int) -> None:
    """Writes the set's header, which marks it as complete."""
    shards, left_out = list[tuple[int, str, str]](), dict[str, str]()
    for number in range(count):
        path = shard_path(out, number, "json")
        told = read_told(path)
        shards.append((len(told.names), told.sha256, sha256_of(path)))
        left_out |= told.left_out
    if not any(pictures for pictures, _, _ in shards):
        raise UserError(f"none of the {len(left_out)} pictures of {header.split} can be read: see the warnings")
    replace(header, shards=shards, left_out=left_out).write(out)


def _folder(name: str) -> str:
    """The class of a picture: the first folder in its name."""
    return name.rpartition("/")[0].partition("/")[0]


def _with_mirror(image: Tensor) -> list[Tensor]:
    return [image, image.flip(-1)]

"""Evaluation for the end of fit and the command line: measure the decoded tokens, write the metrics, draw reconstructions."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from torch import Tensor

from gq_lightning.data import sides
from gq_lightning.data.pictures.reading import BrokenImage, as_images, extended, to_picture
from gq_lightning.data.sets import PictureSet
from gq_lightning.errors import UserError
from gq_lightning.files import write_whole
from gq_lightning.metrics import ReconstructionMetrics
from gq_lightning.tokenizer.module import ImageTokenizer, Reconstruction

# what `generate` writes beside its pictures
TOLD, SHEET = "generated.json", "sheet.png"


@torch.no_grad()
def evaluate(
    tokenizer: ImageTokenizer,
    batches: Iterable[Tensor],
    rfid: bool = True,
    progress: bool = True,
    gaussian_rfid: bool = True,
    gaussian: bool = True,
    tile: int | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, by name, of a tokenizer on batches of images (B, 3, H, W) in [-1, 1] or uint8, of one size or of several; and their
    protocol.

    `gaussian` measures the images decoded from the posterior mean too, `gaussian_rfid` their rFID as well. Images beside the tokenizer's
    grid are extended by reflection, and their reconstructions cut back, as by `encode --fit pad`. With torch.distributed, each rank passes
    its own batches and receives the metrics of all images. Raises UserError if there is no image.
    """
    training = tokenizer.training
    tokenizer.eval()
    metrics = ReconstructionMetrics(tokenizer.quantizer, rfid, gaussian_rfid, gaussian).to(tokenizer.device)
    begin = time.perf_counter()
    for batch in track(batches, description="Evaluating", disable=not progress, transient=True):
        if not len(batch):
            continue
        batch = as_images(batch.to(tokenizer.device))
        result = tokenizer.reconstruct(extended(batch, tokenizer.downsampling, tokenizer.fixed_image_size), tile, gaussian)
        height, width = batch.shape[2:]
        of_mean = None if result.gaussian is None else result.gaussian[..., :height, :width]
        metrics.update(batch, result.images[..., :height, :width], result.tokens, of_mean, result.bits)
    values = metrics.compute()
    if not values:
        raise UserError("no image to evaluate: the evaluation set is empty or unreadable (see the warnings): give another")
    tokenizer.train(training)
    return values | {"evaluation_seconds": round(time.perf_counter() - begin, 2)}, metrics.protocol()


def whole_protocol(tokenizer: ImageTokenizer, tile: int | None) -> dict[str, str]:
    """How whole pictures are measured, which replaces what the data module says of its crops."""
    step, window = tokenizer.downsampling, tokenizer.fixed_image_size or tile
    least = "x".join(map(str, sides(tokenizer.fixed_image_size or step)))
    return {
        "image_size": "whole, each picture in its own size, one at a time",
        "padding": f"by reflection to multiples of {step}, at least {least}; cut back before measuring; all tokens count in the rate",
        "windows": "none" if window is None else f"{'x'.join(map(str, sides(window)))}, overlapping by a quarter, for larger pictures",
        "rfid_pictures": "each is squeezed to 299x299, whatever its shape: compare rFID only with whole pictures of the same set",
    }


def write_metrics(path: Path, values: Mapping[str, Any], protocol: Mapping[str, Any], data: Mapping[str, Any], **facts: Any) -> None:
    """Writes metrics.json: the numbers, and everything needed to reproduce them or to detect an invalid comparison."""
    machine = {"platform": platform.platform(), "processors": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    content = {**values, **facts, "protocol": {**protocol, "data": dict(data)}, "machine": machine}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def draw(images: Tensor, result: Reconstruction, scale: int | None = None) -> Image.Image:
    """An image with labelled rows and a column for each image (B, 3, H, W) in [-1, 1]: original, Gaussian (decoded from the posterior mean,
    if there is one), quantised. `scale` is an integer enlargement; None enlarges small images to about 128 pixels."""
    rows = [("original", images), ("quantised", result.images)]
    if result.gaussian is not None:
        rows.insert(1, ("Gaussian", result.gaussian))
    height, width = images.shape[-2:]
    scale = scale or max(1, round(128 / height))
    margin, gap = 96, 4
    size = (margin + len(images) * (width * scale + gap), len(rows) * (height * scale + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for i, (label, row) in enumerate(rows):
        top = gap + i * (height * scale + gap)
        pen.text((margin - 8, top + height * scale // 2), label, fill="black", font=font, anchor="rm")
        for j, image in enumerate(row):
            picture = to_picture(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + j * (width * scale + gap), top))
    return canvas


def evenly(length: int, count: int) -> list[int]:
    """`count` indices spread evenly over a sequence, including both ends, or all of them if there are fewer."""
    count = min(count, length)
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


def some_images(dataset: PictureSet, count: int) -> Tensor:
    """`count` images spread evenly over a dataset, the same at every call, without unreadable ones."""
    found = []
    for index in evenly(len(dataset), count):
        with contextlib.suppress(BrokenImage):
            found.append(dataset[index])
    if not found:
        raise UserError("the evaluation set has no readable image: repair its pictures, or give another")
    return torch.stack(found)

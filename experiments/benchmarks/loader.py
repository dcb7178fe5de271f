"""How many pictures a second does the loader give, and what holds it up? JPEG files of 500x375 pixels, training crops of 256.

    python experiments/benchmarks/loader.py [--out FILE] [--pictures 96] [--repeats 5] [--gpus 8] [--rate 150]

decode        Pillow, whole: the limit of the decoder
half          Pillow at half the scale (Image.draft), which serves crops that are to be shrunk to half or less
torchvision   torchvision.io.decode_jpeg, whole
picture       the project's load_picture: decoded, upright, RGB
resize        windows of training cut from loaded pictures and resized by Pillow: with `decode`, the least that an item can take
resize, torch the same by torch
item          a training picture on its way to the device: loaded, cropped, uint8, on one core
fast          the same with `crop: fast`, resized by torch
shards        as item, from shards
workers N     batches as the trainer gets them, N worker processes (0: in the main process)

The forms take turns within every repeat; medians. Freed memory stays with the process, as in every command. Workers are given one round
before theirs are timed. The last line is how many workers feed --gpus that take --rate images a second each. The pictures are cut from
photographs that come with scikit-image, in a temporary folder.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from machine import machine, write_ratios
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import decode_jpeg, read_file

from gq_lightning.cli.memory import keep_freed_memory
from gq_lightning.data import ImageNet, Shards, load_picture
from gq_lightning.data.pictures.reading import to_pixels
from gq_lightning.data.sets import TrainingCrop
from gq_lightning.data.shards.writing import write_shards

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
SIZE = (500, 375)  # pixels, the usual ones of ImageNet
QUALITY = 92  # about 110 kB a file, ImageNet's mean
IMAGE_SIZE, BATCH_SIZE = 256, 16
WORKERS = (0, 1, 2)


def write_photographs(folder: Path, count: int) -> int:
    """`count` JPEG files in ImageNet's layout, two of them for validation as well; returns the bytes of all for training."""
    chance, sources = random.Random(0), []
    for name in PHOTOGRAPHS:
        with as_file(files("skimage").joinpath("data", name)) as path:
            sources.append(load_picture(path))
    for index in range(count):
        photograph = sources[index % len(sources)]
        # the largest window of that shape, or down to 70 % of its sides
        width = min(photograph.width, photograph.height * SIZE[0] / SIZE[1]) * chance.uniform(0.7, 1)
        left, top = chance.uniform(0, photograph.width - width), chance.uniform(0, photograph.height - width * SIZE[1] / SIZE[0])
        box = (left, top, left + width, top + width * SIZE[1] / SIZE[0])
        picture = photograph.resize(SIZE, Image.Resampling.BICUBIC, box)
        for split in ("train", "val") if index < 2 else ("train",):
            path = folder / split / f"{index % 10:02d}" / f"{index:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=QUALITY)
    return sum(path.stat().st_size for path in (folder / "train").rglob("*.JPEG"))


def _decode(path: Path, half: bool = False) -> None:
    with Image.open(path) as picture:
        if half:
            picture.draft("RGB", (SIZE[0] // 2, SIZE[1] // 2))
        picture.load()


def forms(root: Path) -> dict[str, Callable[[], Any]]:
    """By name, what goes once through all pictures."""
    paths = sorted((root / "train").rglob("*.JPEG"))
    found: dict[str, Callable[[], Any]] = {
        "decode": lambda: [_decode(path) for path in paths],
        "half": lambda: [_decode(path, half=True) for path in paths],
        "torchvision": lambda: [decode_jpeg(read_file(str(path))) for path in paths],
        "picture": lambda: [load_picture(path) for path in paths],
    }
    loaded = [load_picture(path) for path in paths]
    pixels = [to_pixels(picture) for picture in loaded]
    window = TrainingCrop(IMAGE_SIZE, "resized", (0.8, 1.0)).window
    found["resize"] = lambda: [window(picture) for picture in loaded]
    found["resize, torch"] = lambda: [window(each) for each in pixels]
    for workers in WORKERS:
        module = ImageNet(str(root), image_size=IMAGE_SIZE, batch_size=BATCH_SIZE, workers=workers)
        loader = module.train_dataloader()
        loader.to_trainer = True
        if workers == 0:
            for split in ("train", "val"):
                write_shards(root / split, root / "shards", split=split, broken="unchecked", workers=0)
            sets = {
                "item": module.training_set(),
                "fast": ImageNet(str(root), crop="fast", image_size=IMAGE_SIZE).training_set(),
                "shards": Shards(str(root / "shards"), image_size=IMAGE_SIZE).training_set(),
            }
            for name, pictures in sets.items():
                found[name] = lambda pictures=pictures: [pictures.pixels(index) for index in range(len(pictures))]
        if loader.num_workers == workers:  # the module takes at most one a core
            found[f"workers {workers}"] = lambda loader=loader: [len(batch) for batch in loader]
    return found


def measure(root: Path, pictures: int, repeats: int) -> dict[str, dict[str, float]]:
    """Images a second of each form: the median, the lowest and the highest of all repeats."""
    calls = forms(root)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat:  # the first starts the workers, and reads the files into memory
                taken[name].append(pictures / (time.perf_counter() - begin))
    return {name: {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)} for name, rates in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the loader beside the decoder of JPEG files.")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/benchmarks/loader.json"), help="the JSON file")
    parser.add_argument("--pictures", type=int, default=96, help="files, rounded up to whole batches")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all forms")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs to feed")
    parser.add_argument("--rate", type=float, default=150, help="images a second that one of them takes")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begin, pictures = time.perf_counter(), math.ceil(options.pictures / BATCH_SIZE) * BATCH_SIZE
    keep_freed_memory()
    torch.set_num_threads(1)  # as the workers have it: the item's rate is that of one core
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        size = write_photographs(Path(folder), pictures)
        rates = measure(Path(folder), pictures, options.repeats)
    one = rates["item"]["median"]
    needed = {"gpus": options.gpus, "images_per_second_each": options.rate, "workers": math.ceil(options.gpus * options.rate / one)}
    files_of = {"count": pictures, "width": SIZE[0], "height": SIZE[1], "mean_bytes": round(size / pictures)}
    content = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - begin, 1),
        "files": files_of,
        "image_size": IMAGE_SIZE,
        "batch_size": BATCH_SIZE,
        "images_per_second": {name: {key: round(value, 1) for key, value in rate.items()} for name, rate in rates.items()},
        "milliseconds_of_one_picture": {name: round(1000 / rate["median"], 3) for name, rate in rates.items()},
        "needed": needed,
    }
    ratios = {name: rates["decode"]["median"] / rate["median"] for name, rate in rates.items() if name != "decode"}
    write_ratios(content, options.out, ratios, {"fast": 2.2, "item": 2.2})
    table = Table(title=f"{pictures} JPEG files of {SIZE[0]}x{SIZE[1]}, {size / pictures / 1000:.0f} kB each, to {IMAGE_SIZE}x{IMAGE_SIZE}")
    for column in ("", "images/s", "lowest", "highest", "ms each", "share of decode"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rate in rates.items():
        shown = [f"{rate[key]:.0f}" for key in ("median", "lowest", "highest")]
        table.add_row(name, *shown, f"{1000 / rate['median']:.2f}", f"{rate['median'] / rates['decode']['median']:.0%}")
    table.caption = (
        f"one core gives {one:.0f} images/s; {options.gpus} GPUs of {options.rate:g} images/s each need {needed['workers']} workers, "
        f"{math.ceil(needed['workers'] / options.gpus)} a GPU"
    )
    Console().print(table)


if __name__ == "__main__":
    main()

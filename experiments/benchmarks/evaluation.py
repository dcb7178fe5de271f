"""How long does an evaluation take, and what takes it? Beside the plain form: torch-fidelity's Inception as it comes, nothing remembered.

    python experiments/benchmarks/evaluation.py [--out FILE] [--pictures 32] [--repeats 3]

plain         tokens and Gaussian images, Inception of originals, tokens and Gaussian images as torch-fidelity runs it, and memory
              that goes back to the system when it is freed
first         the project's evaluation, of originals that it sees for the first time
evaluation    the same again: the originals' features are in the cache
tokens alone  the same without the Gaussian images

The forms take turns in one process; medians of seconds a picture, by part. The pictures are cut from photographs that come with
scikit-image; the tokenizer is gq-small-16. `rest` is mostly the Fréchet distance at the end, which does not grow with the pictures.
"""

import argparse
import ctypes
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loader import write_photographs
from machine import machine, write_ratios
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gq_lightning import ImageTokenizer
from gq_lightning.cli import memory
from gq_lightning.data import ImageFolder
from gq_lightning.evaluation.evaluate import evaluate
from gq_lightning.metrics import METRICS
from gq_lightning.weights import feature_cache, inception

SIZES = (64, 256)
WANTED = {"evaluation, 64": 0.5, "evaluation, 256": 0.6}  # of the plain form
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
FORMS = ("plain", "first", "evaluation", "tokens alone")
_plain_extractor = functools.cache(inception._extractor.__wrapped__)


@contextmanager
def plain() -> Iterator[None]:
    """Inception as torch-fidelity runs it, no cache, and glibc's own way with memory."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_MAX, 65536)
    library.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
    library.malloc_trim(0)
    with (
        patch.object(inception, "faster", lambda extractor: extractor),
        patch.object(inception, "_extractor", _plain_extractor),
        patch.object(feature_cache, "remembered", _within_a_batch()),
    ):
        yield
    memory.keep_freed_memory()


def _within_a_batch() -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
    """In place of the cache: what was computed for the tokens serves for the Gaussian images of the same batch."""
    last: dict[bytes, Tensor] = {}

    def remembered(pixels: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        key = pixels.numpy().tobytes()
        if key not in last:
            last.clear()
            last[key] = compute(pixels)
        return last[key]

    return remembered


@contextmanager
def timed(owner: Any, name: str, part: str, taken: dict[str, float]) -> Iterator[None]:
    """Adds to `taken[part]` what calls of `owner.name` take."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            taken[part] += time.perf_counter() - begin

    with patch.object(owner, name, counted):
        yield


def once(tokenizer: ImageTokenizer, batches: list[Tensor], gaussian: bool = True) -> dict[str, float]:
    """Seconds a picture, by part, and in all."""
    taken: dict[str, float] = defaultdict(float)
    watched = [
        (tokenizer.backbone, "encode", "encoder"),
        (tokenizer.backbone, "decode", "decoder"),
        (tokenizer.quantizer, "tokenize", "search"),
    ]
    watched += [(metric, "update", metric.numbers[0].label) for metric in METRICS if metric.of_images]
    begin = time.perf_counter()
    with ExitStack() as stack:
        for owner, name, part in watched:
            stack.enter_context(timed(owner, name, part, taken))
        evaluate(tokenizer, batches, progress=False, gaussian=gaussian)
    whole = time.perf_counter() - begin
    taken["rest"] = whole - sum(taken.values())
    return {part: seconds / sum(map(len, batches)) for part, seconds in taken.items()} | {"all": whole / sum(map(len, batches))}


def measure(size: int, pictures: int, repeats: int) -> dict[str, dict[str, float]]:
    """By form, the median seconds a picture, by part, and in all."""
    tokenizer = ImageTokenizer.from_pretrained("gq-small-16")
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "pictures", pictures)
        root = str(Path(folder) / "pictures/train")
        data = ImageFolder(root=root, validation_root=root, image_size=size, batch_size=8, workers=0)
        batches = list(data.test_dataloader())
        for repeat in range(repeats + 1):
            with patch.object(feature_cache, "cache_folder", lambda repeat=repeat: Path(folder) / f"cache{repeat}"):
                with plain():
                    round_ = {"plain": once(tokenizer, batches)}
                for form in FORMS[1:]:
                    round_[form] = once(tokenizer, batches, gaussian=form != "tokens alone")
            for form, taken in round_.items():
                if repeat:  # the first one loads the networks
                    found[form].append(taken)
    return {form: {part: statistics.median(each[part] for each in taken) for part in taken[0]} for form, taken in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/benchmarks/evaluation.json"))
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory.keep_freed_memory()
    times = {size: measure(size, options.pictures, options.repeats) for size in SIZES}
    ratios = {f"{form}, {size}": forms[form]["all"] / forms["plain"]["all"] for size, forms in times.items() for form in FORMS[1:]}
    for size, forms in times.items():
        table = Table("", *FORMS, title=f"milliseconds a picture of {size}x{size}")
        for part in forms["plain"]:
            table.add_row(part, *(f"{1000 * forms[form].get(part, 0):.1f}" for form in FORMS))
        Console().print(table)
        for parts in forms.values():
            parts.update({part: round(value, 5) for part, value in parts.items()})
    write_ratios({"machine": machine(), "seconds_a_picture": times}, options.out, ratios, WANTED)


if __name__ == "__main__":
    main()

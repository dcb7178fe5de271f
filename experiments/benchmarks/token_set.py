"""What does `tokenize` cost beside the encoder? The seconds to write a token set, over those of the bare forward pass and search.

    python experiments/benchmarks/token_set.py [--out FILE] [--tokenizer gq-small-16] [--pictures 384] [--size 128] [--repeats 3]

set       write_token_set: JPEG files of 500x375 pixels read, cropped, mirrored, encoded, and written with checksums
bare      the same batches, already in memory, through backbone.encode and quantizer.tokenize

Both take turns within every repeat, in one process with one thread; the ratio is that of the fastest repeats, since a busy machine only
slows them down. Worker processes read the pictures, as in the command. `processor` is the same ratio in processor seconds of the main
process, without the workers.
"""

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from loader import write_photographs
from machine import machine, write_ratios

from gq_lightning import ImageTokenizer
from gq_lightning.data import ImageNet
from gq_lightning.tokens.tokenizing import Seen, write_token_set

WANTED, BATCH_SIZE = 1.1, 32


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds."""
    begin = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def measure(tokenizer: ImageTokenizer, root: Path, size: int, repeats: int, workers: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of each form, per repeat."""
    pictures = ImageNet(str(root), image_size=size).training_set()
    seen = Seen(pictures, size, "flip")
    views = [seen[index] for index in range(len(seen))]
    batches = [torch.cat(views[begin : begin + BATCH_SIZE]) for begin in range(0, len(views), BATCH_SIZE)]  # type: ignore[arg-type]

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            tokenizer.quantizer.tokenize(tokenizer.backbone.encode(batch).movedim(1, -1)).cpu()

    def whole() -> None:
        shutil.rmtree(root / "set", ignore_errors=True)
        write_token_set(tokenizer, pictures, root / "set", size, views="flip", batch_size=BATCH_SIZE, workers=workers)

    taken: dict[str, list[tuple[float, float]]] = {"bare": [], "set": []}
    for repeat in range(repeats + 1):
        for name, call in (("bare", bare), ("set", whole)):
            found = timed(call)
            if repeat:
                taken[name].append(found)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Times tokenize beside the encoder's forward pass and search.")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/benchmarks/token_set.json"), help="the JSON file")
    parser.add_argument("--tokenizer", default="gq-small-16", help="a name of `models`, or a folder")
    parser.add_argument("--pictures", type=int, default=384, help="JPEG files")
    parser.add_argument("--size", type=int, default=128, help="side of the encoded images")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of both forms")
    parser.add_argument("--workers", type=int, default=4, help="processes that read, at most one a core")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = ImageTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        write_photographs(Path(folder), options.pictures)
        taken = measure(tokenizer, Path(folder), options.size, options.repeats, options.workers)
    fastest = {name: [min(parts) for parts in zip(*times, strict=True)] for name, times in taken.items()}
    ratio, processor = (whole / bare for whole, bare in zip(fastest["set"], fastest["bare"], strict=True))
    content = {
        "machine": machine(),
        "tokenizer": options.tokenizer,
        "pictures": options.pictures,
        "views": 2,
        "image_size": options.size,
        "batch_size": BATCH_SIZE,
        "workers": options.workers,
        "seconds": {name: [round(wall, 3) for wall, _ in times] for name, times in taken.items()},
    }
    write_ratios(content, options.out, {"tokenize": ratio, "tokenize, processor": processor}, {"tokenize": WANTED})


if __name__ == "__main__":
    main()

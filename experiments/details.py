"""Details of a run for figures: the trajectories of its multipliers and bits, and the histogram of bits per token.

    python experiments/details.py RUN --data FOLDER     writes RUN/details.json

The trajectories come from TensorBoard's events of the training batches, the histogram from all pictures in FOLDER.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gq_lightning import ImageTokenizer
from gq_lightning.data import ImageFolder
from running import write_json

SERIES = ("tdc/lambda_min", "tdc/lambda_mean", "tdc/lambda_max", "bits/min", "bits/mean", "bits/max")
WIDTH = 0.1  # bits, of a bin: a fifth of the TDC's tolerance


def trajectories(run: Path) -> dict[str, list[list[float]]]:
    """[step, value] by name, of what the run has logged; a plain Gaussian VAE has no multipliers."""
    events = EventAccumulator(str(run)).Reload()
    found = [name for name in SERIES if name in events.Tags()["scalars"]]
    return {name: [[event.step, float(f"{event.value:.5g}")] for event in events.Scalars(name)] for name in found}


@torch.no_grad()
def histogram(tokenizer: ImageTokenizer, folder: Path) -> dict[str, Any]:
    """Tokens per bin of `width` bits, the first of which begins at `first` widths."""
    data = ImageFolder(str(folder), str(folder), image_size=tokenizer.fixed_image_size or 256, evaluation_batch_size=32, workers=0)
    counts = torch.zeros(0, dtype=torch.int64)
    for images in data.test_dataloader():
        bits = tokenizer.reconstruct(images).bits
        more = torch.bincount((bits.flatten() / WIDTH).long(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    filled = counts.nonzero().flatten()
    first, last = int(filled[0]), int(filled[-1])
    return {"width": WIDTH, "first": first, "counts": counts[first : last + 1].tolist()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trajectories and histogram of a run.")
    parser.add_argument("run", type=Path, help="folder of a finished run of a Gaussian quantizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures for the histogram")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = ImageTokenizer.from_pretrained(options.run / "tokenizer")
    content = {"trajectories": trajectories(options.run), "bits_histogram": histogram(tokenizer, options.data)}
    write_json(options.run / "details.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

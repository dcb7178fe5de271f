"""Tokenizers on pictures unlike their training pictures: PSNR of tokens and of the posterior mean, and the bits of the tokens.

    python experiments/foreign.py RUN... [--photographs FOLDER]     a JSON of each run, foreign.md and foreign.png
    python experiments/foreign.py                                   draws what there is

A RUN is the folder of a finished run of a Gaussian quantizer, with its `tokenizer/`. Five sets of 384 crops at native resolution:
photographs (those of FOLDER, or scikit-image's), textures, printed text, fields of one colour, and noise.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from gq_lightning import ImageTokenizer
from gq_lightning.metrics.psnr import CAP
from looks import COLOURS, LINES, plain, save
from running import write_json

CROPS, SIZE = 384, 32
WIDTH = 0.25  # bits, of a histogram's bin; the middle one is centred on the target
ALPHA = 0.5  # bits: the half width of the TDC's band
RESULTS = Path(__file__).parent / "results/foreign"


def crops(pictures: list[np.ndarray], size: int, generator: np.random.Generator) -> Tensor:
    """CROPS squares (N, 3, size, size) in [-1, 1] at random places, equally many of each picture (H, W) or (H, W, 3) uint8."""
    cut = []
    for i in range(CROPS):
        picture = pictures[i % len(pictures)]
        top, left = (int(generator.integers(0, side - size + 1)) for side in picture.shape[:2])
        square = picture[top : top + size, left : left + size]
        cut.append(square if square.ndim == 3 else np.repeat(square[..., None], 3, axis=2))
    return torch.from_numpy(np.stack(cut)).movedim(-1, 1).float() / 127.5 - 1


def foreign(size: int, photographs: Path | None) -> dict[str, Tensor]:
    """The five sets, (384, 3, size, size) each in [-1, 1]; the same pictures at every call."""
    generator = np.random.default_rng(0)
    if photographs is None:
        taken = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    else:
        taken = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(photographs.glob("*.png"))]
    flat = torch.from_numpy(generator.uniform(-1, 1, (CROPS, 3, 1, 1))).float().expand(-1, -1, size, size)
    deviation = torch.from_numpy(generator.uniform(0.05, 0.5, (CROPS, 1, 1, 1))).float()
    noise = deviation * torch.from_numpy(generator.standard_normal((CROPS, 3, size, size))).float()
    return {
        "photographs": crops(taken, size, generator),
        "textures": crops([data.brick(), data.grass(), data.gravel()], size, generator),
        "text": crops([data.page(), data.text()], size, generator),
        "flat": flat,
        "noise": noise.clamp(-1, 1),
    }


def psnr(first: Tensor, second: Tensor) -> float:
    """Mean over images (B, 3, H, W) in [-1, 1] of each one's PSNR, dB, at most 100."""
    each = peak_signal_noise_ratio(first, second, data_range=2.0, dim=(1, 2, 3), reduction="none")
    return float(each.clamp(max=CAP).mean())


@torch.no_grad()
def measure(tokenizer: ImageTokenizer, images: Tensor) -> dict[str, Any]:
    parts = [tokenizer.reconstruct(part) for part in images.split(64)]
    bits = torch.cat([part.bits.flatten() for part in parts if part.bits is not None])
    target = math.log2(tokenizer.codebook_size)
    bins = ((bits - target) / WIDTH).round().long()
    return {
        "psnr": psnr(images, torch.cat([part.images for part in parts])),
        "gaussian_psnr": psnr(images, torch.cat([part.gaussian for part in parts if part.gaussian is not None])),
        "bits_min": float(bits.min()),
        "bits_mean": float(bits.mean()),
        "bits_max": float(bits.max()),
        "share_within_alpha": float(((bits - target).abs() <= ALPHA).double().mean()),
        "histogram": {"width": WIDTH, "first": int(bins.min()), "counts": torch.bincount(bins - bins.min()).tolist()},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["<!-- python experiments/foreign.py -->", ""]
    lines += ["PSNR of tokens, dB (of the posterior mean); share of tokens within half a bit of their target, most bits of a token.", ""]
    sets = list(next(iter(results.values()))["sets"])
    lines += [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for name, content in results.items():
        cells = [
            f"{m['psnr']:.2f} ({m['gaussian_psnr']:.2f}); {100 * m['share_within_alpha']:.0f} %, {m['bits_max']:.1f}"
            for m in content["sets"].values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Density of the bits of a token, less their target; a row for each backbone and rate, a column for each set, a line for each run."""
    sets = list(next(iter(results.values()))["sets"])
    # BACKBONE-METHOD-RATE-SEED is the name of an arm
    row_of = {name: "-".join(name.split("-")[::2]) for name in results}
    rows = sorted(set(row_of.values()))
    drawn = Figure(figsize=(2.6 * len(sets), 2.3 * len(rows) + 0.6), layout="constrained")
    panels = drawn.subplots(len(rows), len(sets), squeeze=False, sharey=True, sharex=True)
    for i, row in enumerate(rows):
        shown = {name: content for name, content in results.items() if row_of[name] == row}
        for j, kind in enumerate(sets):
            axes = panels[i, j]
            axes.axvspan(-ALPHA, ALPHA, color="0.9")
            for k, (name, content) in enumerate(shown.items()):
                bins = content["sets"][kind]["histogram"]
                total = sum(bins["counts"]) * bins["width"]
                middles = [(bins["first"] + n) * bins["width"] for n in range(len(bins["counts"]))]
                style = {"color": COLOURS[k % len(COLOURS)], "linestyle": LINES[k % len(LINES)], "label": name, "linewidth": 1.2}
                axes.plot(middles, [count / total if count else math.nan for count in bins["counts"]], marker=".", **style)
            axes.set_yscale("log")
            plain(axes)
            if i == 0:
                axes.set_title(kind, fontsize=10)
            if i == len(rows) - 1:
                axes.set_xlabel("bits of a token less its target", fontsize=8)
        panels[i, 0].set_ylabel("density per bit", fontsize=8)
        panels[i, -1].legend(frameon=False, fontsize=6)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tokenizers on pictures unlike those that they were trained on.")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs of a Gaussian quantizer, each with tokenizer/")
    parser.add_argument("--photographs", type=Path, help="folder of PNG photographs, Kodak's for example; scikit-image's without it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files, the table and the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for run in options.runs:
        tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer")
        sets = foreign(tokenizer.fixed_image_size or SIZE, options.photographs)
        content = {
            "target_bits": math.log2(tokenizer.codebook_size),
            "photographs": options.photographs.name if options.photographs else "scikit-image",
            "sets": {name: measure(tokenizer, images) for name, images in sets.items()},
        }
        write_json(options.results / f"{run.resolve().name}.json", content)
        print(f"{run.resolve().name}: measured", file=sys.stderr)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    if not results:
        parser.error(f"{options.results} has no results yet: name the runs to measure")
    (options.results / "foreign.md").write_text(table(results))
    save(draw(results), [options.results / "foreign.png"])
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

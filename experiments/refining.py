"""The gain of refined tokens, and the loss of shortened tokens, in dB and LPIPS, and the seconds they take.

    python experiments/refining.py --data FOLDER --size 64 [--passes 1 2] [--bits 6 8 10 12 14 16] [--out FILE] TOKENIZER …

One crop of --size of each picture, at a place drawn with seed 0. A line for each tokenizer's folder and number of passes; --bits gives
lines of tokens cut short instead, whose tokenizer has its codebook as a tree. Adds to a JSON file, and draws PSNR over bits beside it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compression import pictures
from gq_lightning import ImageTokenizer
from gq_lightning.weights.lpips import LPIPS


def crops(paths: list[Path], size: int) -> Tensor:
    generator, cut = np.random.RandomState(0), []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        top, left = (generator.randint(side - size + 1) for side in pixels.shape[:2])
        cut.append(torch.from_numpy(pixels[top : top + size, left : left + size].copy()))
    return torch.stack(cut).movedim(-1, 1).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, help="folder of pictures; photographs of scikit-image without it")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--passes", type=int, nargs="*", default=[1])
    parser.add_argument("--bits", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/compression/refining.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, distance = crops(pictures(given.data), given.size), LPIPS("alex")
    lines = json.loads(given.out.read_text()) if given.out.exists() else []
    for folder in given.tokenizers:
        tokenizer = ImageTokenizer.from_pretrained(folder)
        for bits, passes in [(bits, 0) for bits in given.bits] or [(None, passes) for passes in [0, *given.passes]]:
            used = tokenizer if bits is None else tokenizer.coarser(bits)
            begin = time.process_time()
            with torch.no_grad():
                decoded = used.decode(used.encode(images, refine=passes))
                seconds = (time.process_time() - begin) / len(images)
                psnr = 10 * torch.log10(4 / (decoded - images).square().mean((1, 2, 3)))
                line = {
                    "tokenizer": folder.name if folder.name != "tokenizer" else folder.parent.name,
                    "pictures": given.data.name if given.data else "photographs",
                    "size": given.size,
                    "passes": passes,
                    "bits": bits,
                    "psnr": round(psnr.mean().item(), 3),
                    "least_psnr": round(psnr.amin().item(), 3),
                    "lpips": round(distance(decoded, images).mean().item(), 4),
                    "cpu_seconds": round(seconds, 3),
                }
            print(line, flush=True)
            lines = [old for old in lines if any(old[name] != line[name] for name in ("tokenizer", "pictures", "size", "passes", "bits"))]
            lines.append(line)
            given.out.write_text(json.dumps(lines, indent=1) + "\n")
    if given.bits:
        draw(lines, given.out.with_name("bits.png"))


def draw(lines: list[dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(line["tokenizer"] for line in lines if line["bits"]):
        points = sorted((line["bits"], line["psnr"]) for line in lines if line["tokenizer"] == name and line["bits"])
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="bits kept of each token", ylabel="PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()

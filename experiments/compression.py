"""PSNR, SSIM and LPIPS over the size of complete files: JPEG, WebP and AVIF by Pillow, and tokenizers by the command line.

    python experiments/compression.py [experiments/compression.yaml] [--data FOLDER] [--out FOLDER] [--show]

pictures --codec at each quality, or `encode`--> files, whose bytes count --decoded to 8 bits--> PSNR, SSIM, LPIPS of each, averaged

Writes NAME.json, NAME.png and NAME.md, NAME being the folder's; what NAME.json already has is not measured again. A tokenizer's own bytes
count as little as a codec's program does. `--show` measures nothing.
"""

import argparse
import io
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console

from arms import ROOT

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".bmp", ".tif", ".tiff")
BUNDLED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
METRICS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}
MARKERS = "osD^vP*X<>"
Row = dict[str, Any]


def pictures(folder: Path | None) -> list[Path]:
    """The pictures to measure on, in order of their names."""
    if folder is None:
        import skimage

        print("no --data: measuring on five photographs of scikit-image; Kodak's 24 are at https://r0k.us/graphics/kodak", file=sys.stderr)
        return [Path(skimage.__file__).parent / "data" / name for name in BUNDLED]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        sys.exit(f"error: {folder}: no pictures there: name a folder of them")
    return found


def measure(decoded: Image.Image, original: Image.Image) -> dict[str, float]:
    """PSNR on 0..255 over all pixels and channels, SSIM (11 x 11 Gaussian window, per channel), LPIPS of AlexNet."""
    from skimage.metrics import structural_similarity

    a, b = (np.asarray(picture.convert("RGB")).astype(np.float64) for picture in (decoded, original))
    window: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return {
        "psnr": float(10 * np.log10(255**2 / max(((a - b) ** 2).mean(), 1e-10))),
        "ssim": float(structural_similarity(a, b, data_range=255, channel_axis=2, **window)),
        "lpips": float(_lpips()(*(torch.from_numpy(side / 127.5 - 1).permute(2, 0, 1)[None].float() for side in (a, b)))),
    }


@cache
def _lpips() -> Callable[..., torch.Tensor]:
    from gq_lightning.weights.lpips import LPIPS

    network = LPIPS("alex")
    return lambda *images: network(*images)


def averaged(files: Iterator[tuple[int, Image.Image, Image.Image]], series: str, setting: str) -> Row:
    """One point of a figure. files: bytes, decoded picture and original of each."""
    values, total, pixels, rates = [], 0, 0, []
    with torch.no_grad():
        for size, decoded, original in files:
            values.append(measure(decoded, original))
            rates.append(8 * size / (original.width * original.height))
            total, pixels = total + size, pixels + original.width * original.height
    means = {name: round(float(np.mean([value[name] for value in values])), 5) for name in METRICS}
    point = {"bits_per_pixel": round(float(np.mean(rates)), 5), "bytes": total, "pixels": pixels, "pictures": len(values)}
    return {"series": series, "setting": setting, **point, **means}


def by_codec(paths: list[Path], codec: dict[str, Any], quality: int) -> Iterator[tuple[int, Image.Image, Image.Image]]:
    for path in paths:
        original, buffer = Image.open(path).convert("RGB"), io.BytesIO()
        original.save(buffer, format=codec["format"], quality=quality, **codec["options"])
        yield len(buffer.getvalue()), Image.open(buffer), original


def by_tokenizer(paths: list[Path], folder: Path, options: str) -> Iterator[tuple[int, Image.Image, Image.Image]]:
    """Encodes and decodes with the ordinary commands."""
    with tempfile.TemporaryDirectory() as temporary:
        tokens, decoded = Path(temporary) / "tokens", Path(temporary) / "decoded"
        for command in (
            ["encode", *map(str, paths), *shlex.split(options), "--out", str(tokens)],
            ["decode", str(tokens), "--out", str(decoded)],
        ):
            call = [sys.executable, "-m", "gq_lightning", command[0], "--tokenizer", str(folder), *command[1:]]
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        for path in paths:
            (file,) = tokens.glob(f"{path.name}.tokens*")
            yield file.stat().st_size, Image.open(decoded / f"{path.stem}.png"), Image.open(path).convert("RGB")


def planned(
    spec: dict[str, Any],
) -> Iterator[tuple[str, str, Callable[[list[Path]], Iterator[tuple[int, Image.Image, Image.Image]]] | None]]:
    """Series, setting, and how to make its files; None where a tokenizer is missing."""
    for name, codec in spec["codecs"].items():
        for quality in codec["quality"]:
            yield name, f"quality {quality}", lambda paths, codec=codec, quality=quality: by_codec(paths, codec, quality)
    for tokenizer in spec["tokenizers"]:
        for value in tokenizer.get("each", [None]):
            folder = ROOT / tokenizer["folder"].format(value)
            for options in tokenizer["encode"]:
                setting = f"{folder.relative_to(ROOT)} {options}".strip()
                make = (lambda paths, folder=folder, options=options: by_tokenizer(paths, folder, options)) if folder.is_dir() else None
                yield tokenizer["label"], setting, make


def figure(rows: list[Row], title: str) -> plt.Figure:
    drawn, axes = plt.subplots(1, len(METRICS), figsize=(13.5, 4.4), layout="constrained")
    names = list(dict.fromkeys(row["series"] for row in rows))
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for index, name in enumerate(names):
            points = sorted((row["bits_per_pixel"], row[metric]) for row in rows if row["series"] == name)
            axis.plot(*zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], color=f"C{index}", label=name, markersize=5)
        axis.set(xlabel="bits per pixel of whole files", ylabel=label, xscale="log")
        axis.set_xticks(ticks := [0.2, 0.3, 0.5, 1, 1.5], [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    drawn.suptitle(title)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def interpolated(rows: list[Row], series: str, bits_per_pixel: float) -> float | None:
    """PSNR at a rate, linear in the rate's logarithm; None further than a twentieth from what was measured."""
    points = sorted((row["bits_per_pixel"], row["psnr"]) for row in rows if row["series"] == series)
    if not points or not 0.95 * points[0][0] <= bits_per_pixel <= 1.05 * points[-1][0]:
        return None
    rates, values = zip(*points, strict=True)
    return float(np.interp(np.log(bits_per_pixel), np.log(rates), values))


def markdown(rows: list[Row], anchors: dict[str, list[list[float]]], missing: list[str]) -> str:
    lines = ["| files | setting | bits per pixel | PSNR | SSIM | LPIPS |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['bits_per_pixel']:.3f} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['lpips']:.4f}"
        lines.append(f"| {row['series']} | {row['setting']} | {figures} |")
    if any(row["pictures"] == 24 for row in rows):
        lines += ["", "| published by CompressAI on Kodak | bits per pixel | PSNR | here |", "|---|---|---|---|"]
        for series, points in anchors.items():
            for rate, value in points:
                here = interpolated(rows, series, rate)
                lines.append(f"| {series} | {rate:g} | {value:.1f} | {'not measured' if here is None else f'{here:.2f}'} |")
    lines += ["", *(f"Not measured, there is no such folder: {name}." for name in missing)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", type=Path, default=ROOT / "experiments/compression.yaml")
    parser.add_argument("--data", type=Path, help="folder of pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/compression")
    parser.add_argument("--show", action="store_true", help="draw what there is")
    given = parser.parse_args()
    spec, paths, console = yaml.safe_load(given.spec.read_text()), pictures(given.data), Console(stderr=True)
    name = given.data.resolve().name if given.data else "photographs"
    target = given.out / f"{name}.json"
    before: list[Row] = json.loads(target.read_text())["points"] if target.exists() else []
    rows, missing = [], []
    given.out.mkdir(parents=True, exist_ok=True)
    for series, setting, make in planned(spec):
        row = next((row for row in before if (row["series"], row["setting"], row["pictures"]) == (series, setting, len(paths))), None)
        if row is None and make is None:
            missing.append(setting)
        elif row is None and make is not None and not given.show:
            row = averaged(make(paths), series, setting)
            console.print(row, highlight=False)
        if row is not None:
            rows.append(row)
            target.write_text(json.dumps({"pictures": [path.name for path in paths], "points": rows}, indent=1) + "\n")
    if not rows:
        sys.exit(f"error: {target}: nothing is measured yet: call without --show")
    figure(rows, f"{len(paths)} pictures of {name}").savefig(target.with_suffix(".png"), dpi=110)
    target.with_suffix(".md").write_text(markdown(rows, spec["anchors"], missing))
    print(target.with_suffix(".md"))


if __name__ == "__main__":
    main()

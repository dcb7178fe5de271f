"""The table and the contact sheet of generation.yaml, from the JSON files and the pictures of its arms.

    python experiments/generation.py [--results experiments/results/generation] [--runs runs/experiments/generation]

Writes generation.md and generation.png into the results; arms that are missing are left out.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from arms import ROOT
from gq_lightning.data import load_picture, to_picture, to_tensor
from gq_lightning.data.pictures.reading import save_picture
from points import spread

COLUMNS = {"gfid": ".1f", "sfid": ".1f", "inception_score": ".2f", "precision": ".3f", "recall": ".3f"}
HEADINGS = ["bits per pixel", "by counts", "uniform", "gFID", "sFID", "Inception score", "precision", "recall"]
QUANTIZERS = {"gq_wide": "GQ", "fsq_tuned": "FSQ"}
KINDS = {"held_out": "held-out pictures through their tokens", "prior": "prior", "counts": "tokens drawn from counts"}
SHOWN, SCALE = 16, 2
Contents = dict[tuple[str, str, int], list[tuple[str, dict[str, Any]]]]


def contents(results: Path) -> Contents:
    """By kind, quantizer and rate: (stage and name, content) of each seed."""
    found: Contents = defaultdict(list)
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        if (stage := path.parent.name) in ("prior", "control"):
            arm = content["arm"]
            found[arm.get("tokens", stage), arm["quantizer"], arm["bits_per_position"]].append((f"{stage}/{path.stem}", content))
    order = list(KINDS)
    return dict(sorted(found.items(), key=lambda item: (item[0][2], order.index(item[0][0]), list(QUANTIZERS).index(item[0][1]))))


def cell(values: list[float | None], form: str) -> str:
    """The mean; of several seeds with the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean, low, high = spread(known)
    return f"{mean:{form}}" + (f" ({low:{form}} to {high:{form}})" if len(known) > 1 else "")


def table(found: Contents) -> str:
    rows = [f"| pictures of | {' | '.join(HEADINGS)} |", "|---" * (len(HEADINGS) + 1) + "|"]
    for (kind, quantizer, bits), arms in found.items():
        every = [content["metrics"] | content.get("details", {}) for _, content in arms]
        forms = {name: ".4f" for name in ("bits_per_pixel", "bits_per_pixel_counts", "bits_per_pixel_uniform")} | COLUMNS
        cells = [cell([content.get(name) for content in every], form) for name, form in forms.items()]
        rows.append(f"| {QUANTIZERS[quantizer]}, {bits} bits, {KINDS[kind]} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def sheet(found: Contents, runs: Path) -> Image.Image | None:
    """A row of pictures for each row of the table, those of the first seed."""
    rows = []
    for (kind, quantizer, bits), arms in found.items():
        paths = [runs / arms[0][0] / f"pictures/{number:06d}.png" for number in range(SHOWN)]
        if all(path.is_file() for path in paths):
            label = f"{QUANTIZERS[quantizer]}, {bits} bits, {KINDS[kind]}"
            rows.append((label, make_grid(torch.stack([to_tensor(load_picture(path)) for path in paths]), nrow=SHOWN, pad_value=1)))
    if not rows:
        return None
    strips = [to_picture(grid) for _, grid in rows]
    strips = [strip.resize((strip.width * SCALE, strip.height * SCALE), Image.Resampling.NEAREST) for strip in strips]
    font, top = ImageFont.load_default(14), 20
    canvas = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height + top for strip in strips)), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for (label, _), strip in zip(rows, strips, strict=True):
        pen.text((4, y + 2), label, fill="black", font=font)
        canvas.paste(strip, (0, y + top))
        y += strip.height + top
    return canvas


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table and contact sheet of generation.yaml.")
    parser.add_argument("--results", type=Path, default=ROOT / "experiments/results/generation")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/experiments/generation")
    options = parser.parse_args(arguments)
    if not (found := contents(options.results)):
        print(f"error: {options.results}: no finished arms: run `make reproduce-generation DATA=FOLDER`", file=sys.stderr)
        return 2
    (options.results / "generation.md").write_text(text := table(found))
    print(text)
    if (picture := sheet(found, options.runs)) is not None:
        save_picture(picture, options.results / "generation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Adds a trained tokenizer to the package: rounds its weights to half precision, measures it, and writes its card.

    python experiments/box.py RUN NAME --kodak FOLDER --imagenet FOLDER --training "4 hours of one core; 12 000 steps of 8 crops"

RUN is a run's folder. The numbers are of the rounded weights: whole photographs of Kodak's at their size, and held-out photographs of
ImageNet, shorter side to 256 and centre crop. Rounded weights are stored without loss, so that what is measured is what ships.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image, ImageDraw

from compression import measure
from gq_lightning import ImageTokenizer
from gq_lightning.cli.web.trial import jpeg_within
from gq_lightning.data.pictures.reading import center_crop, load_picture, resize_shorter, scale_pixels, to_picture, to_pixels
from gq_lightning.files import write_whole
from gq_lightning.tokenizer.box import BOX
from running import write_json

SUFFIXES = (".png", ".jpg", ".jpeg")
SIDE = 256
CARD = """\
---
library_name: gq_lightning
tags: [image-tokenizer, vector-quantization, gaussian-quant]
---

# {name}

{bits:g} bits for every 8x8 pixels, {bits_per_pixel:g} bits per pixel, {parameters:.2f} M parameters, pictures of any size.

```python
from gq_lightning import ImageTokenizer

tokenizer = ImageTokenizer.from_pretrained("{name}")
tokens = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, H/8, W/8, {tokens}) int64
images = tokenizer.decode(tokens)
```

**Trained** on {data}. {training}.

**Measured** on whole photographs of Kodak's {kodak_pictures}, and on {imagenet_pictures} held-out photographs of ImageNet at
256x256; neither set was trained or tuned on.

| | PSNR | SSIM | LPIPS (AlexNet) | JPEG of the same bytes: PSNR | LPIPS |
|---|---|---|---|---|---|
{rows}

![Kodak's photographs with the lowest, the middle and the highest PSNR: original, decoded, JPEG of the same bytes](examples.jpg)

*Kodak's photographs with the lowest, the middle and the highest PSNR: original, decoded from tokens, JPEG of the same bytes.*

**Where it fails:** {failures}
"""


def found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


@torch.no_grad()
def decoded(tokenizer: ImageTokenizer, picture: Image.Image) -> Image.Image:
    """Through tokens and back, at the picture's size, which is a multiple of 8."""
    images = scale_pixels(to_pixels(picture))[None]
    return to_picture(tokenizer.decode(tokenizer.encode(images))[0])


def jpeg(picture: Image.Image, most: int) -> Image.Image:
    return Image.open(io.BytesIO(jpeg_within(picture, most)[0])).convert("RGB")


def through(tokenizer: ImageTokenizer, pictures: list[Image.Image]) -> tuple[dict[str, float], list[tuple[float, list[Image.Image]]]]:
    """Means over the pictures, and for each its PSNR with original, decoded and JPEG of the same bytes."""
    values: list[dict[str, float]] = []
    shown = []
    for picture in pictures:
        tokens = tokenizer.quantizer.bits_per_position / tokenizer.downsampling**2 * picture.width * picture.height / 8
        sides = [decoded(tokenizer, picture), jpeg(picture, int(tokens))]
        ours, theirs = (measure(side, picture) for side in sides)
        values.append(ours | {f"jpeg_{name}": value for name, value in theirs.items()})
        shown.append((ours["psnr"], [picture, *sides]))
        texts = [f"{value['psnr']:.2f} dB, LPIPS {value['lpips']:.3f}" for value in (ours, theirs)]
        print(f"{len(values)} of {len(pictures)}: {texts[0]}; JPEG {texts[1]}", file=sys.stderr)
    return {name: round(fmean(value[name] for value in values), 4) for name in values[0]}, shown


def sheet(rows: list[list[Image.Image]], side: int = SIDE) -> Image.Image:
    """Rows of pictures, each cut to a square of `side` around its centre at its own resolution, with a line of names above."""
    canvas = Image.new("RGB", (3 * side + 16, len(rows) * (side + 8) + 16), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(("original", "tokens", "JPEG, same bytes")):
        draw.text((column * (side + 8) + 4, 2), name, fill="black")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            canvas.paste(picture.crop((left, top, left + side, top + side)), (column * (side + 8), 16 + row * (side + 8)))
    return canvas


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Puts a trained tokenizer into the box.")
    parser.add_argument("run", type=Path, help="folder of a run, with tokenizer/")
    parser.add_argument("name", help="NAME-BITS, as users will call it")
    parser.add_argument("--kodak", type=Path, required=True, help="folder of photographs that are measured whole")
    parser.add_argument("--imagenet", type=Path, required=True, help="folder of held-out photographs, measured at 256 x 256")
    parser.add_argument("--data", required=True, help="what it was trained on, in words")
    parser.add_argument("--training", required=True, help="steps, batch and time, in words")
    parser.add_argument("--failures", required=True, help="what its pictures lack, in words, after looking at them")
    parser.add_argument("--box", type=Path, default=BOX, help="folder of the box")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = ImageTokenizer.from_pretrained(options.run / "tokenizer")
    with torch.no_grad():
        for tensor in tokenizer.backbone.parameters():
            tensor.copy_(tensor.half().float())
    folder = options.box / options.name
    tokenizer.save_pretrained(folder)
    tokenizer = ImageTokenizer.from_pretrained(folder)
    kodak = [load_picture(path) for path in found(options.kodak)]
    imagenet = [center_crop(resize_shorter(load_picture(path), SIDE), SIDE) for path in found(options.imagenet)]
    measured: dict[str, Any] = {"fingerprint": tokenizer.fingerprint, "training": options.training, "data": options.data}
    rows = []
    for name, pictures in (("kodak", kodak), ("imagenet", imagenet)):
        values, shown = through(tokenizer, pictures)
        rate = tokenizer.quantizer.bits_per_position / tokenizer.downsampling**2
        measured[name] = {"bits_per_pixel": rate, "pictures": len(pictures), **values}
        label = {"kodak": "Kodak", "imagenet": "ImageNet"}[name]
        quality = f"{values['psnr']:.2f} dB | {values['ssim']:.4f} | {values['lpips']:.3f}"
        rows.append(f"| {label} | {quality} | {values['jpeg_psnr']:.2f} dB | {values['jpeg_lpips']:.3f} |")
        if name == "kodak":
            shown.sort(key=lambda pair: pair[0])
            sheet([shown[i][1] for i in (0, len(shown) // 2, -1)]).save(folder / "examples.jpg", quality=90)
    write_json(folder / "measured.json", measured)
    text = CARD.format(
        name=options.name,
        bits=tokenizer.quantizer.bits_per_position,
        bits_per_pixel=measured["kodak"]["bits_per_pixel"],
        parameters=sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6,
        tokens=tokenizer.tokens_per_position,
        data=options.data,
        training=options.training,
        kodak_pictures=len(kodak),
        imagenet_pictures=len(imagenet),
        rows="\n".join(rows),
        failures=options.failures,
    )
    write_whole(folder / "README.md", text.encode())
    print(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

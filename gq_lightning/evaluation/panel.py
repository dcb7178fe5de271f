"""A picture, its reconstruction, and heat maps of error and of bits per token."""

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from gq_lightning.data import to_picture
from gq_lightning.metrics.reconstruction import to_255

GAP = 6


def panel(original: Tensor, decoded: Tensor, bits: Tensor | None = None) -> Image.Image:
    """Original and decoded picture (3, H, W) in [-1, 1] above heat maps of error and, if given, of bits per token (h, w, n), the mean of a
    position's n tokens."""
    error = (to_255(decoded.cpu()) - to_255(original.cpu())).abs().mean(0)
    # the largest errors, on a few edges, would leave the rest dark
    most = max(1.0, float(error.flatten().quantile(0.99)))
    cells = [
        ("original", to_picture(original)),
        ("from tokens", to_picture(decoded)),
        (f"error, 0 to {most:.0f} of 255", heat_map(error, 0, most)),
    ]
    if bits is not None:
        lowest, highest = float(bits.min()), float(bits.max())
        # an exact divergence varies only by rounding, which is not worth showing
        low, high = (lowest, highest) if highest - lowest > 0.05 else (lowest - 1, highest + 1)
        cells.append((f"bits per token, {lowest:.1f} to {highest:.1f}", heat_map(bits.float().mean(-1), low, high)))
    height, width = original.shape[-2:]
    size = max(20, width // 14)  # readable when TensorBoard shows the panel at a third of its size
    title_height = 3 * size // 2
    canvas = Image.new("RGB", (2 * width + 3 * GAP, 2 * (height + title_height) + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for number, (title, picture) in enumerate(cells):
        row, column = divmod(number, 2)
        left, top = GAP + column * (width + GAP), row * (height + title_height)
        pen.text((left, top + title_height // 2), title, fill="black", font=font, anchor="lm")
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top + title_height))
    return canvas


def heat_map(values: Tensor, low: float, high: float) -> Image.Image:
    """Values (H, W) as colours: black at `low`, red in the middle, pale yellow at `high`."""
    levels = ((values.float().cpu() - low) / (high - low)).clamp(0, 1) * 255
    grey = Image.fromarray(levels.round().to(torch.uint8).numpy())
    return ImageOps.colorize(grey, black="#000004", mid="#bc3754", white="#fcffa4")

"""Summary of a tokenizer before training: parameters, FLOPs per image and the geometry of its tokens.

A module on the meta device has shapes but no values, so even the largest model takes only seconds, without memory, data or weights.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gq_lightning.data import Size, sides
from gq_lightning.tokenizer import ImageTokenizer

Format = Literal["table", "json", "markdown"]
CONVENTION = "FLOPs: 2 per multiply-accumulate, of the convolutions, linear layers and attention of the backbone"


@dataclass(frozen=True)
class Summary:
    """The summary of one tokenizer at one image size, in pixels.

    Attributes:
        parameters: of `encoder`, `decoder` and `quantizer`, and their `total`, as in a saved tokenizer, without buffers (a random codebook,
            multipliers, moving averages).
        training_only: parameters used only in training, such as those of an adversary.
        encode_flops, decode_flops: per image, by `CONVENTION`, without the quantizer.
    """

    backbone: str
    quantizer: str
    image_size: Size
    parameters: dict[str, int]
    training_only: dict[str, int]
    encode_flops: int
    decode_flops: int
    tokens_per_position: int
    codebook_size: int
    bits_per_position: float
    bits_per_pixel: float
    tokens_per_image: int


def summarize(tokenizer: ImageTokenizer, image_size: Size, training: nn.Module | None = None) -> Summary:
    """The summary of a tokenizer, on the meta device or any other. The other children of `training`, which trains it, count as
    `training_only`. Raises UserError if the backbone does not accept images of `image_size`."""
    backbone, quantizer, device = tokenizer.backbone, tokenizer.quantizer, tokenizer.backbone.last_layer.device
    height, width = sides(image_size)
    grid = (height // tokenizer.downsampling, width // tokenizer.downsampling)
    parameters = {"encoder": _count(backbone.encoder), "decoder": _count(backbone.decoder), "quantizer": _count(quantizer)}
    parameters["total"] = _count(backbone) + parameters["quantizer"]
    children = () if training is None else training.named_children()
    others = {name: _count(child) for name, child in children if child is not tokenizer}
    return Summary(
        backbone=type(backbone).__name__,
        quantizer=type(quantizer).__name__,
        image_size=image_size,
        parameters=parameters,
        training_only={name: count for name, count in others.items() if count},
        encode_flops=_flops(backbone.encode, torch.empty(1, 3, height, width, device=device)),
        decode_flops=_flops(backbone.decode, torch.empty(1, quantizer.latent_channels, *grid, device=device)),
        tokens_per_position=quantizer.tokens_per_position,
        codebook_size=quantizer.codebook_size,
        bits_per_position=quantizer.bits_per_position,
        bits_per_pixel=quantizer.bits_per_position / tokenizer.downsampling**2,
        tokens_per_image=grid[0] * grid[1] * quantizer.tokens_per_position,
    )


def render(summary: Summary, form: Format = "table") -> Table | str:
    """A rich table, a JSON object, or a markdown table with one row."""
    if form == "json":
        return json.dumps(dataclasses.asdict(summary), indent=2)
    size = "{}x{}".format(*sides(summary.image_size))
    millions = {name: f"{count / 1e6:.2f} M" for name, count in summary.parameters.items()}
    if form == "markdown":
        cells = {
            "backbone": summary.backbone,
            "quantizer": summary.quantizer,
            "encoder": millions["encoder"],
            "decoder": millions["decoder"],
            "quantizer's own": millions["quantizer"],
            "parameters": millions["total"],
            f"GFLOPs encode, {size}": f"{summary.encode_flops / 1e9:.1f}",
            "decode": f"{summary.decode_flops / 1e9:.1f}",
            "tokens": f"{summary.tokens_per_image:,} of {summary.codebook_size:,}",
            "bits per pixel": f"{summary.bits_per_pixel:.4g}",
        }
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells.keys(), ["---"] * len(cells), cells.values()))
    title = f"{summary.backbone} and {summary.quantizer}, images of {size}"
    table = Table("", "", "exactly", title=title, title_justify="left", caption=CONVENTION, caption_justify="left")
    besides = {f"{name} (in training only)": count for name, count in summary.training_only.items()}
    for name, count in (summary.parameters | besides).items():
        table.add_row(f"parameters, {name}", f"{count / 1e6:.2f} M", f"{count:,}")
    table.add_section()
    for verb, flops in (("encode", summary.encode_flops), ("decode", summary.decode_flops)):
        table.add_row(f"GFLOPs per image, {verb}", f"{flops / 1e9:.1f}", f"{flops:,}")
    table.add_section()
    for name in ("tokens_per_position", "codebook_size", "bits_per_position", "bits_per_pixel", "tokens_per_image"):
        value = getattr(summary, name)
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.7g}", "")
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _flops(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    # on the meta device, scaled_dot_product_attention counts as two matrix products
    with FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops()

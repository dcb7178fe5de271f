"""Generates images: tokens drawn from a prior, decoded by its tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from gq_lightning.data import center_crop, load_picture, resize_shorter, to_picture, to_tensor
from gq_lightning.errors import UserError
from gq_lightning.priors.module import Prior
from gq_lightning.priors.sampling import PLAIN, Sampling, noise, sample
from gq_lightning.tokenizer import ImageTokenizer


def check_fit(prior: Prior, tokenizer: ImageTokenizer, source: str) -> None:
    """Raises UserError unless the prior was trained on this tokenizer's tokens; `source` is the tokenizer's folder."""
    if (found := tokenizer.tokens_fingerprint) != prior.tokenizer:
        raise UserError(
            f"{source}: is tokenizer {found[:12]}, but the prior was trained on tokens of {prior.tokenizer[:12]}: give that as --tokenizer"
        )
    quantizer = tokenizer.quantizer
    ours = (prior.grid[2], prior.codebook_size, prior.downsampling)
    if ours != (quantizer.tokens_per_position, quantizer.codebook_size, tokenizer.backbone.downsampling):
        raise UserError(f"{source}: has other tokens than the prior, whose config.json was changed: copy the prior again")


def generate(
    prior: Prior,
    tokenizer: ImageTokenizer,
    labels: Sequence[int],
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    given: Tensor | None = None,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda more: None,
) -> Iterator[Tensor]:
    """Draws and decodes pictures, batch by batch: yields images (3, H, W) in [-1, 1], on the CPU.

    Args:
        labels: label of each picture, -1 for no class.
        numbers: number of each picture, which together with the seed determines its random numbers. None counts from 0.
        given: (1, k, n) tokens of the first k positions, which every picture keeps.
        advance: called with the number of pictures just finished.
    """
    device = prior.label.weight.device
    known = None if given is None else prior.spelling.split(given)
    pictures = list(zip(range(len(labels)) if numbers is None else numbers, labels, strict=True))
    for begin in range(0, len(pictures), batch_size):
        batch = pictures[begin : begin + batch_size]
        chosen = torch.tensor([label for _, label in batch], device=device)
        kept = None if known is None else known.expand(len(batch), -1, -1)
        symbols = torch.stack(list(sample(prior, chosen, noise(prior, seed, [number for number, _ in batch]), sampling, kept)), dim=1)
        yield from tokenizer.decode(prior.join(symbols)).float().cpu()
        advance(len(batch))


def sheet(prior: Prior, tokenizer: ImageTokenizer, count: int, **options: Any) -> Image.Image:
    """`count` pictures side by side, cycling through the classes; `options` as in `generate`."""
    labels = [number % len(prior.classes) if prior.classes else -1 for number in range(count)]
    return to_picture(make_grid(list(generate(prior, tokenizer, labels, **options)), nrow=8, pad_value=1))


def first_rows(prior: Prior, tokenizer: ImageTokenizer, picture: Path, keep: float) -> Tensor:
    """Tokens (1, k, n) of the upper share `keep` of a picture's rows, for `generate` to continue. The picture is cropped as in evaluation.
    Raises UserError if the picture cannot be read, or `keep` is not a share."""
    if not 0 <= keep <= 1:
        raise UserError(f"--keep {keep:g}: give a share of the rows, from 0 to 1")
    height, width, _ = prior.grid
    size = (height * prior.downsampling, width * prior.downsampling)
    image = to_tensor(center_crop(resize_shorter(load_picture(picture), size), size))
    return tokenizer.encode(image[None])[:, : round(keep * height)].flatten(1, 2)

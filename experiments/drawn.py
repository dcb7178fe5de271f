"""Pictures without a prior: of tokens drawn independently by their counts in training, or of the held-out pictures' own tokens.

    python experiments/drawn.py --tokens counts|held_out --root TOKENS --tokenizer TOKENIZER --out FOLDER [--count 2000] [--seed 0]

Writes FOLDER/pictures/*.png and FOLDER/metrics.json, with the bits per pixel of held-out pictures under these probabilities.
"""

import argparse
import sys
from pathlib import Path

import torch

from gq_lightning import ImageTokenizer
from gq_lightning.data import to_picture
from gq_lightning.data.pictures.reading import save_picture
from gq_lightning.priors.counts import counted_bits_per_pixel, uniform_bits_per_pixel
from gq_lightning.tokens import TokenSet
from running import write_json

TOGETHER = 100


def by_counts(training: TokenSet, count: int, seed: int) -> torch.Tensor:
    """Tokens (count, h, w, n), each drawn by the counts of its place within a position."""
    height, width, n = training.header.grid
    shares = torch.from_numpy(training.counts()).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.multinomial(share, count * height * width, replacement=True, generator=generator) for share in shares]
    return torch.stack(drawn, dim=-1).view(count, height, width, n)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pictures of tokens drawn from counts, or of the held-out pictures' tokens.")
    parser.add_argument("--tokens", choices=("counts", "held_out"), required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of the token sets")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000, help="pictures, at most the held-out ones for held_out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = ImageTokenizer.from_pretrained(options.tokenizer)
    training = TokenSet(options.root / "train", tokenizer.tokens_fingerprint)
    held_out = TokenSet(options.root / "val", tokenizer.tokens_fingerprint, first_view=True)
    counted = counted_bits_per_pixel(training, held_out)
    metrics = {"bits_per_pixel_uniform": uniform_bits_per_pixel(held_out), "bits_per_pixel_counts": counted}
    if options.tokens == "counts":
        tokens = by_counts(training, options.count, options.seed)
        metrics["bits_per_pixel"] = counted
    else:
        tokens = torch.stack([held_out[index][0] for index in range(min(options.count, len(held_out)))])
    for begin in range(0, len(tokens), TOGETHER):
        for number, image in enumerate(tokenizer.decode(tokens[begin : begin + TOGETHER]), begin):
            save_picture(to_picture(image), options.out / f"pictures/{number:06d}.png")
    write_json(options.out / "metrics.json", {**metrics, "pictures": len(tokens)})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pictures to token files."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt


def run(
    *images: Path,
    tokenizer: str,
    out: Path,
    fit: Literal["pad", "resize", "crop"] = "pad",
    size: PositiveInt | None = None,
    deterministic: bool = False,
    tile: PositiveInt | None = None,
    skip_broken: bool = False,
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """Pictures to token files.

    Args:
        images: pictures or folders of them
        tokenizer: tokenizer's folder, or owner/repository on the hub
        out: folder of the token files
        fit: pad: keep the size, pad to the grid, cut back on decoding; resize: shorter side to --size and centre crop; crop: centre crop to
            the grid
        size: for --fit resize, in pixels
        deterministic: tokens independent of batching, to the bit
        tile: see large pictures in overlapping tiles of this side, in pixels, to bound memory
        skip_broken: name and count pictures that cannot be decoded instead of stopping
        device: torch device; auto is a GPU where there is one
        threads: CPU threads
    """
    from gq_lightning.cli.loading import load_tokenizer
    from gq_lightning.tokens.codec import encode_pictures

    loaded = load_tokenizer(tokenizer, device, threads)
    encode_pictures(loaded, images, out, fit, size, deterministic, tile, skip_broken)

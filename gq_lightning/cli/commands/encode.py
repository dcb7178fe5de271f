"""Encode pictures to token files."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from gq_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gq_lightning.tokenizer.refining import Distance


def run(
    *images: Path,
    tokenizer: str,
    out: Path,
    fit: Literal["pad", "resize", "crop"] = "pad",
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
    deterministic: bool = False,
    tile: PositiveInt | None = None,
    skip_broken: bool = False,
    bits: PositiveInt | None = None,
    refine: NonNegativeInt = 0,  # type: ignore[assignment]
    refine_lpips: PositiveFloat | None = None,
    prior: str | None = None,
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """Encode pictures to token files.

    Args:
        images: pictures or folders of them
        out: folder of the token files
        fit: pad: keep the size, pad to the grid, cut back on decoding; resize: to cover --size, and centre crop; crop: centre crop to
            the grid
        size: for --fit resize, in pixels, a number or [height,width]
        deterministic: tokens independent of batching, to the bit
        tile: encode large pictures in overlapping tiles of this side, in pixels, to bound memory; a ViT has tiles of its own size
        skip_broken: name and count pictures that cannot be decoded instead of stopping
        bits: keep this many bits of each token; needs a codebook ordered as a tree (convert --order tree)
        refine: number of passes that choose tokens by decoding them; slow
        refine_lpips: in --refine, minimise the squared error plus this many times LPIPS
        prior: code the tokens with the probabilities of this prior where that is smaller, a folder or owner/repository on the hub; decode
            needs it too
    """
    from gq_lightning.cli.loading import load_coder, load_tokenizer
    from gq_lightning.tokens.codec import encode_pictures

    loaded = load_tokenizer(tokenizer, device, threads)
    if refine_lpips is not None and not (refine and math.isfinite(refine_lpips)):
        raise UserError(f"--refine_lpips {refine_lpips}: give a positive number together with --refine, or leave it out")
    if prior is not None and bits is not None:
        raise UserError(f"--bits {bits}: a prior codes whole tokens: leave out --bits or --prior")
    distance = _squared_error_and_lpips(refine_lpips) if refine_lpips else None
    chosen = {"bits": bits, "refine": refine, "distance": distance, "prior": load_coder(prior, loaded, tokenizer)}
    encode_pictures(loaded, images, out, fit, size, deterministic, tile, skip_broken, **chosen)  # type: ignore[arg-type]


def _squared_error_and_lpips(weight: float) -> "Distance":
    """Squared error plus `weight` times LPIPS, summed over pixels, of images in [-1, 1]; small regions are padded with grey for LPIPS."""
    from torch.nn import functional

    from gq_lightning.tokenizer.refining import squared_error
    from gq_lightning.weights.lpips import LPIPS

    network = LPIPS("alex")

    def distance(images: "Tensor", originals: "Tensor") -> "Tensor":
        missing = [max(0, 32 - side) for side in images.shape[:1:-1]]
        padded = [functional.pad(side, (0, missing[0], 0, missing[1])) for side in (images, originals)]
        return squared_error(images, originals) + weight * padded[0][0, 0].numel() * network(*padded)

    return distance

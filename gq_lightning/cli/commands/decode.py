"""Decode token files to PNG."""

from pathlib import Path

from jsonargparse.typing import PositiveInt


def run(
    *tokens: Path,
    tokenizer: str,
    out: Path,
    tile: PositiveInt | None = None,
    any_tokenizer: bool = False,
    prior: str | None = None,
    device: str = "auto",
    threads: PositiveInt | None = None,
) -> None:
    """Decode token files to PNG.

    Args:
        tokens: token files or folders of them
        out: folder of the pictures
        tile: decode large pictures in overlapping tiles of this side, in pixels, to bound memory; a ViT has tiles of its own size
        any_tokenizer: accept tokens that another tokenizer made
        prior: the prior with which the tokens were coded, a folder or owner/repository on the hub
    """
    from gq_lightning.cli.loading import load_coder, load_tokenizer
    from gq_lightning.tokens.codec import decode_pictures

    loaded = load_tokenizer(tokenizer, device, threads)
    coder = load_coder(prior, None if any_tokenizer else loaded, tokenizer)
    decode_pictures(loaded, tokens, out, tile=tile, any_tokenizer=any_tokenizer, prior=coder)

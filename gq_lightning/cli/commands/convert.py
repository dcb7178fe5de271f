"""Convert a run or a checkpoint to a tokenizer by Gaussian Quant."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from gq_lightning.errors import printable


def run(
    source: Path,
    /,
    *,
    out: Path,
    codebook: Literal["iid", "sobol", "quantile"] | None = None,
    codebook_size: PositiveInt | None = None,
    prior_weight: NonNegativeFloat | None = None,
    seed: int | None = None,
    order: Literal["none", "tree"] | None = None,
) -> None:
    """Convert by Gaussian Quant: freeze the encoder, attach the random codebook, write the tokenizer.

    Args:
        source: run's folder, checkpoint, or tokenizer's folder
        out: folder to write
        codebook: a different generator than in training; quantile is TokenBridge's
        codebook_size: a different size; the tokens per position follow from the rate
        prior_weight: a different weight of the prior
        seed: a different seed of the codebook
        order: tree orders the codewords from coarse to fine, for priors and tokens of fewer bits
    """
    from gq_lightning.callbacks.gaussian_quant import another_codebook, convert
    from gq_lightning.tokenizer import ImageTokenizer
    from gq_lightning.tokenizer.checkpoint import load_checkpoint
    from gq_lightning.tokenizer.folder import CONFIG

    is_tokenizer = (source / CONFIG).is_file()
    tokenizer = ImageTokenizer.from_pretrained(source) if is_tokenizer else load_checkpoint(source)
    given = {"codebook": codebook, "codebook_size": codebook_size, "prior_weight": prior_weight, "seed": seed, "order": order}
    changes = {name: value for name, value in given.items() if value is not None}
    convert(tokenizer, another_codebook(tokenizer.quantizer, changes, str(source)) if changes else None)
    tokenizer.save_pretrained(out)
    tokens = f"{tokenizer.tokens_per_position} tokens of {tokenizer.codebook_size} per position"
    print(f"{printable(out)}: {type(tokenizer.backbone).__name__}, {tokens}")

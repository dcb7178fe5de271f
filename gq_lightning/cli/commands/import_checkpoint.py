"""Import a checkpoint of the authors' code as a tokenizer."""

from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from gq_lightning.errors import printable


def run(
    checkpoint: Path,
    /,
    *,
    backbone: Literal["unet", "vit"],
    bits_per_position: PositiveInt,
    out: Path,
    codebook_size: PositiveInt = 65536,  # type: ignore[assignment]
    config: str | None = None,
) -> None:
    """Import a Gaussian checkpoint of the authors' code as a tokenizer. No code in the file is run.

    Args:
        checkpoint: Lightning file with a state_dict
        backbone: architecture of the checkpoint
        bits_per_position: rate it was trained for: 16, 32 or 64
        out: folder to write
        codebook_size: codebook size it was trained for
        config: YAML file with the sizes of the backbone, if they are not the paper's
    """
    from gq_lightning.cli.configs import find_config
    from gq_lightning.importers.authors import import_checkpoint

    tokenizer = import_checkpoint(checkpoint, backbone, bits_per_position, codebook_size, config and find_config(config))
    tokenizer.save_pretrained(out)
    print(f"{printable(out)}: {type(tokenizer.backbone).__name__}, {tokenizer.quantizer.extra_repr()}")

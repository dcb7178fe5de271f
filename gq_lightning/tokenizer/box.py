"""The tokenizers in the box: small ones, trained on photographs, that are part of the package.

gq_lightning/box/NAME/  config.json, model.safetensors   a tokenizer's folder, see `folder`
                        README.md                        its card: data, training, what it measures, where it fails
                        measured.json                    the numbers of the card
"""

import json
from pathlib import Path
from typing import Any

BOX = Path(__file__).parents[1] / "box"


def names() -> list[str]:
    """Of all, by their rate."""
    return sorted((path.parent.name for path in BOX.glob("*/config.json")), key=lambda name: int(name.rpartition("-")[2]))


def boxed(name: str | Path) -> Path | None:
    """The folder of the tokenizer of that name, or None."""
    return BOX / str(name) if str(name) in names() else None


def measured(name: str) -> dict[str, Any]:
    """The numbers of a card: by set of pictures, `psnr` (dB), `ssim`, `lpips`, as `evaluate` gives them; and its training."""
    found: dict[str, Any] = json.loads((BOX / name / "measured.json").read_text())
    return found

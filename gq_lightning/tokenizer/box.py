"""Small tokenizers, trained on photographs, that ship with the package.

gq_lightning/box/NAME/  config.json, model.safetensors   a tokenizer's folder, see `folder`
                        README.md                        its model card: data, training, metrics, failures
                        measured.json                    the numbers on the card
"""

import json
from pathlib import Path
from typing import Any

BOX = Path(__file__).parents[1] / "box"


def names() -> list[str]:
    """Names of all shipped tokenizers, by rate."""
    return sorted((path.parent.name for path in BOX.glob("*/config.json")), key=lambda name: int(name.rpartition("-")[2]))


def boxed(name: str | Path) -> Path | None:
    """The folder of the shipped tokenizer of that name, or None."""
    return BOX / str(name) if str(name) in names() else None


def measured(name: str) -> dict[str, Any]:
    """The numbers on a card: for each set of pictures, `psnr` (dB), `ssim` and `lpips` as `evaluate` reports them; and the training."""
    found: dict[str, Any] = json.loads((BOX / name / "measured.json").read_text())
    return found

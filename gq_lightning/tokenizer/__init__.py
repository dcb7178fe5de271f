"""ImageTokenizer: what a user of tokens holds, and its way to a folder or the hub and back."""

from gq_lightning.tokenizer.module import ImageTokenizer

__all__ = ["ImageTokenizer"]

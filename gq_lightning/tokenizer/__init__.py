"""ImageTokenizer: images to tokens and back, and saving to and loading from a folder or the hub."""

from gq_lightning.tokenizer.module import ImageTokenizer

__all__ = ["ImageTokenizer"]

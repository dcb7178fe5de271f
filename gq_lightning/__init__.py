"""gq_lightning: images to discrete tokens by Gaussian Quant, https://arxiv.org/abs/2512.06609."""

from typing import TYPE_CHECKING

from gq_lightning.errors import UserError

if TYPE_CHECKING:
    from gq_lightning.tokenizer import ImageTokenizer

# pyproject.toml reads it here
__version__ = "0.1.0"
__all__ = ["ImageTokenizer", "UserError", "__version__"]


def __getattr__(name: str) -> object:
    # torch is imported with the first tokenizer: a command's --help needs neither
    if name == "ImageTokenizer":
        from gq_lightning.tokenizer import ImageTokenizer

        return ImageTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

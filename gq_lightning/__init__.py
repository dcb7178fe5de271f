"""gq_lightning: images to discrete tokens by Gaussian Quant, https://arxiv.org/abs/2512.06609."""

from typing import TYPE_CHECKING

from gq_lightning.errors import UserError

if TYPE_CHECKING:
    from gq_lightning.tokenizer import ImageTokenizer
    from gq_lightning.tokens.token_file import TokenFile, read_tokens, write_tokens

# pyproject.toml reads the version from here
__version__ = "0.1.0"
__all__ = ["ImageTokenizer", "TokenFile", "UserError", "__version__", "read_tokens", "write_tokens"]


def __getattr__(name: str) -> object:
    # importing these imports torch, which --help does not need
    if name == "ImageTokenizer":
        from gq_lightning.tokenizer import ImageTokenizer

        return ImageTokenizer
    if name in ("TokenFile", "read_tokens", "write_tokens"):
        from gq_lightning.tokens import token_file

        return getattr(token_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

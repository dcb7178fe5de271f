"""Tokens as files: one picture's tokens, pictures to token files and back, and sets of many pictures' tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gq_lightning.tokens.module import TokenSets
    from gq_lightning.tokens.token_set import TokenSet

__all__ = ["TokenSet", "TokenSets"]


def __getattr__(name: str) -> object:
    # who decodes tokens needs neither Lightning nor sets
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'module' if name == 'TokenSets' else 'token_set'}"), name)

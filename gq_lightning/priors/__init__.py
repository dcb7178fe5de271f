"""Priors: transformers over tokens, which predict the next token, price pictures in bits, and draw new ones."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gq_lightning.priors.module import Prior

__all__ = ["Prior"]


def __getattr__(name: str) -> object:
    # transformers is imported with the first prior
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.module").Prior

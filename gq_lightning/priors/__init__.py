"""Priors: transformers over tokens that predict the next token, measure images in bits, and generate new ones."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gq_lightning.priors.module import Prior

__all__ = ["Prior"]


def __getattr__(name: str) -> object:
    # importing Prior imports transformers
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.module").Prior

"""Token files, the codec between pictures and token files, and token sets."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gq_lightning.tokens.module import TokenSets
    from gq_lightning.tokens.token_set import TokenSet

__all__ = ["TokenSet", "TokenSets"]


def __getattr__(name: str) -> object:
    # decoding needs neither Lightning nor token sets
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'module' if name == 'TokenSets' else 'token_set'}"), name)

"""Pictures in tar archives: the data module that reads them, and the tool that writes them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gq_lightning.data.shards.module import Shards

__all__ = ["Shards"]


def __getattr__(name: str) -> object:
    # a data module needs Lightning, the tool does not
    if name == "Shards":
        from gq_lightning.data.shards.module import Shards

        return Shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Pictures in tar archives: the data module that reads them, and the tool that writes them."""

from gq_lightning.data.shards.module import Shards

__all__ = ["Shards"]

"""The pretrained weights of LPIPS and FID: download, verification and cache."""

from gq_lightning.weights.cache import WEIGHTS, Cached, checksum, fetch, load, report, store

__all__ = ["WEIGHTS", "Cached", "checksum", "fetch", "load", "report", "store"]

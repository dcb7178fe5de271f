"""The pretrained weights of LPIPS and FID: download, verification and cache."""

from gq_lightning.weights.cache import WEIGHTS, checksum, fetch, load, store

__all__ = ["WEIGHTS", "checksum", "fetch", "load", "store"]

"""The pretrained networks behind LPIPS and FID: where they come from, and the proof that they are the right ones."""

from gq_lightning.weights.cache import WEIGHTS, Cached, checksum, fetch, load, report, store

__all__ = ["WEIGHTS", "Cached", "checksum", "fetch", "load", "report", "store"]

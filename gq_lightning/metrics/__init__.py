"""How well images survive their tokens: quality, rate and use of the codebook, over all images and processes."""

from gq_lightning.metrics.reconstruction import ReconstructionMetrics

__all__ = ["ReconstructionMetrics"]

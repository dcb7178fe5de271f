"""How well images survive their tokens: quality, rate and use of the codebook, over all images and processes."""

from gq_lightning.metrics.base import ImageMetric, Metric, Number
from gq_lightning.metrics.reconstruction import METRICS, ReconstructionMetrics, numbers

__all__ = ["METRICS", "ImageMetric", "Metric", "Number", "ReconstructionMetrics", "numbers"]

"""Metrics of a tokenizer over all images and processes: quality, rate and codebook usage."""

from gq_lightning.metrics.base import ImageMetric, Metric, Number
from gq_lightning.metrics.reconstruction import GAUSSIAN, METRICS, ReconstructionMetrics, numbers

__all__ = ["GAUSSIAN", "METRICS", "ImageMetric", "Metric", "Number", "ReconstructionMetrics", "numbers"]

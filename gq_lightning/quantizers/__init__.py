"""Quantizers: features to tokens and back."""

from gq_lightning.quantizers.base import Quantized, Quantizer
from gq_lightning.quantizers.gaussian import GaussianQuantizer

__all__ = ["GaussianQuantizer", "Quantized", "Quantizer"]

"""Quantizers: features to tokens and back."""

from gq_lightning.quantizers.base import Quantized, Quantizer
from gq_lightning.quantizers.fsq import FiniteScalarQuantizer
from gq_lightning.quantizers.gaussian import GaussianQuantizer
from gq_lightning.quantizers.tokenbridge import TokenBridge
from gq_lightning.quantizers.vq import VectorQuantizer

__all__ = ["FiniteScalarQuantizer", "GaussianQuantizer", "Quantized", "Quantizer", "TokenBridge", "VectorQuantizer"]

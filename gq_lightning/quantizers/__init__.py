"""Quantizers: features to tokens and back."""

from gq_lightning.quantizers.base import Quantized, Quantizer
from gq_lightning.quantizers.bsq import BinarySphericalQuantizer
from gq_lightning.quantizers.fsq import FiniteScalarQuantizer
from gq_lightning.quantizers.gaussian import GaussianQuantizer
from gq_lightning.quantizers.lfq import LookupFreeQuantizer
from gq_lightning.quantizers.tokenbridge import TokenBridge
from gq_lightning.quantizers.vq import VectorQuantizer

__all__ = [
    "BinarySphericalQuantizer",
    "FiniteScalarQuantizer",
    "GaussianQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "TokenBridge",
    "VectorQuantizer",
]

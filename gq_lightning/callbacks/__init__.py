"""Lightning callbacks: the TDC update, the Gaussian Quant post-training hook, export, pictures and diagnostics."""

from gq_lightning.callbacks.diagnostics import Diagnostics
from gq_lightning.callbacks.export import Export
from gq_lightning.callbacks.gaussian_quant import GaussianQuant
from gq_lightning.callbacks.reconstructions import Reconstructions
from gq_lightning.callbacks.tdc import TDC
from gq_lightning.callbacks.tokens import TokenWriter

__all__ = ["TDC", "Diagnostics", "Export", "GaussianQuant", "Reconstructions", "TokenWriter"]

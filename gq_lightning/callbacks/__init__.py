"""Lightning callbacks: the TDC update, the Gaussian Quant post-training hook, export, pictures, diagnostics, resuming, ends."""

from gq_lightning.callbacks.acceleration import Acceleration
from gq_lightning.callbacks.advice import Advice
from gq_lightning.callbacks.broken_pictures import BrokenPictures
from gq_lightning.callbacks.checkpoint_files import CheckpointFiles
from gq_lightning.callbacks.diagnostics import Diagnostics
from gq_lightning.callbacks.exact_resume import ExactResume
from gq_lightning.callbacks.export import Export
from gq_lightning.callbacks.gaussian_quant import GaussianQuant
from gq_lightning.callbacks.last_checkpoint import LastCheckpoint
from gq_lightning.callbacks.lost_ranks import LostRanks
from gq_lightning.callbacks.non_finite import NonFinite
from gq_lightning.callbacks.preemption import Preemption
from gq_lightning.callbacks.reconstructions import Reconstructions
from gq_lightning.callbacks.tdc import TDC
from gq_lightning.callbacks.tokens import TokenWriter

__all__ = [
    "TDC",
    "Acceleration",
    "Advice",
    "BrokenPictures",
    "CheckpointFiles",
    "Diagnostics",
    "ExactResume",
    "Export",
    "GaussianQuant",
    "LastCheckpoint",
    "LostRanks",
    "NonFinite",
    "Preemption",
    "Reconstructions",
    "TokenWriter",
]

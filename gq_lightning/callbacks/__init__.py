"""Lightning callbacks: the TDC update, the Gaussian Quant post-training hook, export, reports, resuming, preemption."""

from gq_lightning.callbacks.acceleration import Acceleration
from gq_lightning.callbacks.export import Export
from gq_lightning.callbacks.gaussian_quant import GaussianQuant
from gq_lightning.callbacks.surviving.checkpoint_files import CheckpointFiles
from gq_lightning.callbacks.surviving.exact_resume import ExactResume
from gq_lightning.callbacks.surviving.last_checkpoint import LastCheckpoint
from gq_lightning.callbacks.surviving.lost_ranks import LostRanks
from gq_lightning.callbacks.surviving.preemption import Preemption
from gq_lightning.callbacks.tdc import TDC
from gq_lightning.callbacks.token_writer import TokenWriter
from gq_lightning.callbacks.watching.advice import Advice
from gq_lightning.callbacks.watching.broken_pictures import BrokenPictures
from gq_lightning.callbacks.watching.dashboard import Dashboard
from gq_lightning.callbacks.watching.diagnostics import Diagnostics
from gq_lightning.callbacks.watching.non_finite import NonFinite
from gq_lightning.callbacks.watching.outset import Outset
from gq_lightning.callbacks.watching.reconstructions import Reconstructions

__all__ = [
    "TDC",
    "Acceleration",
    "Advice",
    "BrokenPictures",
    "CheckpointFiles",
    "Dashboard",
    "Diagnostics",
    "ExactResume",
    "Export",
    "GaussianQuant",
    "LastCheckpoint",
    "LostRanks",
    "NonFinite",
    "Outset",
    "Preemption",
    "Reconstructions",
    "TokenWriter",
]

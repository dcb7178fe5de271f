"""Which callbacks a quantizer needs, and in what order callbacks are called and why. Lightning keeps it at each hook."""

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import SaveConfigCallback

from gq_lightning.callbacks.acceleration import Acceleration
from gq_lightning.callbacks.export import Export
from gq_lightning.callbacks.gaussian_quant import GaussianQuant
from gq_lightning.callbacks.surviving.exact_resume import ExactResume
from gq_lightning.callbacks.surviving.last_checkpoint import LastCheckpoint
from gq_lightning.callbacks.surviving.lost_ranks import LostRanks
from gq_lightning.callbacks.surviving.preemption import Preemption
from gq_lightning.callbacks.tdc import TDC
from gq_lightning.callbacks.token_writer import TokenWriter
from gq_lightning.callbacks.watching.advice import Advice
from gq_lightning.callbacks.watching.broken_pictures import BrokenPictures
from gq_lightning.callbacks.watching.diagnostics import Diagnostics
from gq_lightning.callbacks.watching.non_finite import NonFinite
from gq_lightning.callbacks.watching.outset import Outset
from gq_lightning.callbacks.watching.reconstructions import Reconstructions
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer

# class -> why it stands here; a subclass has the place of the nearest class above it
ORDER: dict[type[Callback], str] = {
    BatchSizeFinder: "tries steps out before the training begins; Lightning wants it first",
    LearningRateFinder: "the same",
    ExactResume: "seeds the step before any other callback draws",
    NonFinite: "stops at a spoiled step before any other callback uses it",
    LearningRateMonitor: "reports; any place will do",
    Reconstructions: "reports; any place will do",
    Diagnostics: "reports; any place will do",
    BrokenPictures: "reports; any place will do",
    Outset: "reports; any place will do",
    TokenWriter: "writes at predict alone; any place will do",
    ProgressBar: "is gone before one of the following prints a last word",
    Preemption: "lets the ranks agree to stop before LastCheckpoint looks whether they do",
    LostRanks: "a rank that was told to stop is not lost: after Preemption",
    WeightAveraging: "puts the averages in place before they are converted and exported, and copies the model before it is compiled",
    Callback: "TDC, GaussianQuant, PriorExport and any other, in the order in which they are given; what the quantizer needs comes first",
    Export: "writes and measures what a post-training hook has converted",
    Advice: "looks at the multipliers as TDC has moved them",
    Acceleration: "compiles the model when nobody copies it any more",
    SaveConfigCallback: "marks the folder as a run's when nothing before it has refused to start",
    Checkpoint: "keeps what all of the above have made of the step; Lightning wants checkpoints last",
    ModelCheckpoint: "the same",
    LastCheckpoint: "keeps which checkpoint is the best one",
}
_PLACES = {kind: place for place, kind in enumerate(ORDER)}


def needed(quantizer: Quantizer, given: Iterable[Callback]) -> list[Callback]:
    """The callbacks without which a quantizer would not be trained as its method has it, and which are not given."""
    kinds = (TDC, GaussianQuant) if isinstance(quantizer, PosteriorQuantizer) else ()
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks in the order of ORDER; those that share a place stay in the order given."""
    return sorted(callbacks, key=lambda callback: next(_PLACES[kind] for kind in type(callback).__mro__ if kind in _PLACES))

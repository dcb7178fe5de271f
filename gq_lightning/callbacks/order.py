"""The callbacks that a quantizer needs, and the order of all callbacks with the reasons. Lightning keeps this order at each hook."""

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

from gq_lightning import callbacks as ours
from gq_lightning.quantizers.base import PosteriorQuantizer, Quantizer

# class -> the reason for its place; a subclass has the place of its nearest base class
ORDER: dict[type[Callback], str] = {
    BatchSizeFinder: "tries steps before training begins; Lightning requires it first",
    LearningRateFinder: "the same",
    ours.ExactResume: "seeds the step before any other callback uses random numbers",
    ours.NonFinite: "stops at a non-finite step before any other callback uses it",
    LearningRateMonitor: "reports; any place works",
    ours.Dashboard: "reports; any place works",
    ours.Reconstructions: "reports; any place works",
    ours.Diagnostics: "reports; any place works",
    ours.BrokenPictures: "reports; any place works",
    ours.Outset: "reports; any place works",
    ours.TokenWriter: "writes only in predict; any place works",
    ProgressBar: "must be gone before a later callback prints its final message",
    ours.Preemption: "lets the ranks agree to stop before LastCheckpoint checks",
    ours.LostRanks: "after Preemption, because a rank that was told to stop is not lost",
    WeightAveraging: "puts the averages in place before conversion and export, and copies the model before it is compiled",
    Callback: "TDC, GaussianQuant, PriorExport and any other, in the given order; those that the quantizer needs come first",
    ours.Export: "writes and measures the tokenizer after the post-training hooks have converted it",
    ours.Advice: "reads the multipliers after TDC has moved them",
    ours.Acceleration: "compiles the model after all copies of it are made",
    SaveConfigCallback: "marks the folder as a run after all others have agreed to start",
    Checkpoint: "saves the state after all others have finished the step; Lightning requires checkpoints last",
    ModelCheckpoint: "the same",
    ours.LastCheckpoint: "records which checkpoint is the best",
}
_PLACES = {kind: place for place, kind in enumerate(ORDER)}


def needed(quantizer: Quantizer, given: Iterable[Callback]) -> list[Callback]:
    """The callbacks that a quantizer's method requires and that are not given."""
    kinds = (ours.TDC, ours.GaussianQuant) if isinstance(quantizer, PosteriorQuantizer) else ()
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks sorted by ORDER; those with the same place keep their order."""
    return sorted(callbacks, key=lambda callback: next(_PLACES[kind] for kind in type(callback).__mro__ if kind in _PLACES))

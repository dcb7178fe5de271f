"""ImageDataModule: two picture sets and everything that is the same for all of them.

training_set()   -> shuffled and cropped at random, both by the seed (see `order`), whole batches (B, 3, image_size, image_size) in [-1, 1]
evaluation_set() -> in order, every picture exactly once on one of the ranks; validation, test and prediction
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from gq_lightning.data.loading import Guarded, Loader, collate, heed_only_the_parent
from gq_lightning.data.order import InTurn, Shuffled
from gq_lightning.data.pictures.reading import INTERPOLATION
from gq_lightning.data.sets import PictureSet, fingerprint
from gq_lightning.distributed import rank, ranks
from gq_lightning.errors import UserError


class ResumableDataModule(LightningDataModule, ABC):
    """Batches of a training set of pictures, or of what was made of them, shuffled by the seed, and of an evaluation set in order.

    A checkpoint holds the seed and the place in the epoch: a resumed training sees what the uninterrupted one would have seen.

    Args:
        batch_size: pictures in a training batch, on each device.
        evaluation_batch_size: pictures in an evaluation batch; null takes batch_size.
        workers: processes that read, at most one a core.
        collate: makes a batch of a list of items.
    """

    def __init__(self, batch_size: int, evaluation_batch_size: int | None, workers: int, collate: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self.batch_size, self.workers, self._collate = batch_size, workers, collate
        self.evaluation_batch_size = batch_size if evaluation_batch_size is None else evaluation_batch_size
        for name in ("batch_size", "evaluation_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} {getattr(self, name)}: give a positive number")
        if workers < 0:
            raise UserError(f"data.workers {workers}: give 0 (read in the main process) or more")
        self._training_loader: Loader | None = None
        self._resumed: dict[str, int] | None = None

    @property
    @abstractmethod
    def _training(self) -> Any:
        """The set to learn from; it takes places, see `order`."""

    @property
    @abstractmethod
    def _evaluation(self) -> Any:
        """The set to measure with."""

    @property
    def pictures(self) -> tuple[int, int]:
        """How many there are to train on and to evaluate with."""
        return len(self._training), len(self._evaluation)

    @cached_property
    def seed(self) -> int:
        """Seed of the order and crops of training: torch's seed when training begins, that of the first rank on all ranks."""
        seed = torch.initial_seed()
        return seed if self.trainer is None else self.trainer.strategy.broadcast(seed)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._training_loader is None else {"seed": self.seed, **self._training_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed, self._resumed = state_dict["seed"], state_dict

    def train_dataloader(self) -> Loader:
        """Raises UserError where a rank's share of the set is smaller than one batch."""
        items, count = len(self._training), ranks()
        if items // count < self.batch_size:
            where = f" on each of {count} devices" if count > 1 else ""
            raise UserError(
                f"the training set has {items} pictures, too few for one batch of {self.batch_size}{where}: lower data.batch_size"
            )
        self._training_loader = loader = self._loader(self._training, self.batch_size, sampler=self._order(), drop_last=True)
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
            self._resumed = None
        return loader

    def batches_before(self, epoch: int) -> int:
        """As how many batches of the training epoch those count that it was resumed behind; 0 where it is not the one that was resumed."""
        return 0 if self._training_loader is None else self._training_loader.batches_before(epoch)

    def val_dataloader(self) -> Loader:
        """The evaluation set in order. Where ranks do not divide it, some have a batch more: reduce after the loop, not in it."""
        items, count = len(self._evaluation), ranks()
        if items < count:
            raise UserError(f"the evaluation set has {items} pictures for {count} devices: evaluate on at most {items}")
        sampler = InTurn(self._evaluation, count, rank()) if count > 1 else None
        return self._loader(self._evaluation, self.evaluation_batch_size, sampler=sampler)

    def test_dataloader(self) -> Loader:
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        return self.val_dataloader()

    def _order(self) -> Shuffled:
        return Shuffled(self._training, ranks(), rank(), self.seed)

    def _loader(self, items: Any, batch_size: int, **settings: Any) -> Loader:
        workers = min(self.workers, cores())
        return Loader(
            items,
            batch_size=batch_size,  # by name: Lightning replaces it in prediction
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self._collate,
            worker_init_fn=heed_only_the_parent,
            # else each pass over it would draw from the random numbers of the model
            generator=torch.Generator(),
            **settings,
        )


class ImageDataModule(ResumableDataModule):
    """Images of one size, without labels.

    Broken pictures: in training each is named once, in a warning of the logger ``gq_lightning.data`` and in the run's
    broken_pictures.txt, and replaced by the next readable one, until `max_broken` is too many; in evaluation the first stops the run
    with BrokenImage, or with `skip_broken` they are left out of the batches.

    Args:
        image_size: side of the square images in pixels.
        batch_size: images in a training batch, on each device.
        evaluation_batch_size: images in an evaluation batch; null takes batch_size.
        workers: processes that read pictures, at most one a core.
        skip_broken: evaluate without the pictures that cannot be read, instead of stopping at the first.
        max_broken: stop training when more than this share of the pictures drawn so far could not be read: of those that the order
            of training asked this process and its workers for since it began, each counted once, at least 200 or all there are.
    """

    def __init__(
        self,
        image_size: int = 256,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        workers: int = 4,
        skip_broken: bool = False,
        max_broken: float = 0.2,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, collate)
        self.image_size, self.skip_broken = image_size, skip_broken
        if image_size < 1:
            raise UserError(f"data.image_size {image_size}: give a positive number")
        if not 0 <= max_broken <= 1:
            raise UserError(f"data.max_broken {max_broken}: give a share between 0 and 1")
        self.max_broken = max_broken

    @abstractmethod
    def training_set(self) -> PictureSet:
        """The pictures to learn from, cropped at random."""

    @abstractmethod
    def evaluation_set(self) -> PictureSet:
        """The pictures to measure with: the same tensors in the same order every time."""

    @cached_property
    def _training(self) -> Guarded:  # type: ignore[override]
        return Guarded(self.training_set(), "replace", self.max_broken)

    @cached_property
    def _evaluation(self) -> Guarded:  # type: ignore[override]
        return Guarded(self.evaluation_set(), "leave out" if self.skip_broken else "stop")

    @property
    def loaded(self) -> list[Guarded]:
        """The picture sets used so far, with what was found to be broken in each; the same sets on all ranks."""
        return [self.__dict__[name] for name in ("_training", "_evaluation") if name in self.__dict__]

    @property
    def skipped(self) -> int:
        """Number of broken pictures that this process and its workers met and left out, each counted once."""
        return sum(int(guarded.broken.count_nonzero()) for guarded in self.loaded)

    def protocol(self) -> dict[str, Any]:
        """The evaluation set in plain data, free of machine paths, for results to be compared by."""
        pictures = self._evaluation.pictures
        return {
            "data": type(self).__name__,
            "split": pictures.split,
            "images": len(pictures),
            "image_size": self.image_size,
            "resize": pictures.resize,
            "crop": pictures.crop,
            "interpolation": INTERPOLATION,
            "value_range": [-1.0, 1.0],
            "broken_pictures": "left out" if self.skip_broken else "stop the evaluation",
            "fingerprint": fingerprint(pictures),
        }

    def batch_names(self, epoch: int, batch: int) -> list[str]:
        """Names of the pictures of this rank's training batch; where one is broken, the next readable one was in its place."""
        order = self._order()
        order.set_epoch(epoch)
        order.start = (self._training_loader or self.train_dataloader()).pictures_before(epoch, batch)
        return [self._training.name(index) for index, _ in islice(order, self.batch_size)]


def cores() -> int:
    """How many processes this one may have at work at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

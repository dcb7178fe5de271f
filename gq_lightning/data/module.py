"""ImageDataModule: a training set and an evaluation set, and the loading that all data modules share.

training_set()   -> shuffled and cropped at random by the seed (see `order`), full batches (B, 3, height, width) in [-1, 1]
evaluation_set() -> in order, each picture exactly once on one of the ranks; used by validation, test and prediction
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from gq_lightning.construction import Size, shortened, sides
from gq_lightning.data.loading import Guarded, Loader, collate, heed_only_the_parent
from gq_lightning.data.order import InTurn, Shuffled
from gq_lightning.data.pictures.reading import INTERPOLATION, as_images
from gq_lightning.data.sets import PictureSet, fingerprint
from gq_lightning.distributed import rank, ranks
from gq_lightning.errors import UserError


class ResumableDataModule(LightningDataModule, ABC):
    """Batches of a training set, shuffled by the seed, and of an evaluation set, in order. The items are pictures or their tokens.

    A checkpoint holds the seed and the position in the epoch, so a resumed training sees the same pictures as an uninterrupted one.
    """

    _training: Any  # indexed by places, see `order`
    _evaluation: Any

    def __init__(self, batch_size: int, evaluation_batch_size: int | None, workers: int, collate: Callable[[list[Any]], Any]) -> None:
        super().__init__()
        self.batch_size, self.workers, self._collate = batch_size, workers, collate
        self.evaluation_batch_size = batch_size if evaluation_batch_size is None else evaluation_batch_size
        for name in ("batch_size", "evaluation_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} {getattr(self, name)}: give a positive number")
        if workers < 0:
            raise UserError(f"data.workers {workers}: give 0 (the main process reads) or more")
        self._training_loader: Loader | None = None
        self._resumed: dict[str, int] | None = None

    @property
    def pictures(self) -> tuple[int, int]:
        """Sizes of the training and the evaluation set."""
        return len(self._training), len(self._evaluation)

    @cached_property
    def seed(self) -> int:
        """Seed of the order and crops of training: torch's seed on the first rank when training begins."""
        seed = torch.initial_seed()
        return seed if self.trainer is None else self.trainer.strategy.broadcast(seed)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._training_loader is None else {"seed": self.seed, **self._training_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed, self._resumed = state_dict["seed"], state_dict

    def train_dataloader(self) -> Loader:
        """Raises UserError if a rank's share of the set is smaller than one batch."""
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
        """Batches of the epoch that count as done before training was resumed; 0 for any epoch but the resumed one."""
        return 0 if self._training_loader is None else self._training_loader.batches_before(epoch)

    def val_dataloader(self) -> Loader:
        """The evaluation set in order. Ranks may have different numbers of batches, so reduce after the loop, not in it."""
        items, count = len(self._evaluation), ranks()
        if items < count:
            raise UserError(f"the evaluation set has {items} pictures for {count} devices: evaluate on at most {items}")
        sampler = InTurn(self._evaluation, count, rank()) if count > 1 else None
        return self._loader(self._evaluation, self.evaluation_batch_size, sampler=sampler)

    test_dataloader = predict_dataloader = val_dataloader

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
            to_trainer=self.trainer is not None,
            worker_init_fn=heed_only_the_parent,
            # its own generator, so that iterating does not change the model's random numbers
            generator=torch.Generator(),
            **settings,
        )


class ImageDataModule(ResumableDataModule):
    """Images of one size, without labels.

    Broken pictures: in training, each is named once, in a warning of the logger ``gq_lightning.data`` and in the run's
    broken_pictures.txt, and replaced by the next readable one, unless there are more than `max_broken`. In evaluation, the first stops
    the run with BrokenImage; with `skip_broken` they are left out of the batches.

    Args:
        image_size: of the images in pixels, the side of squares or [height, width].
        batch_size: images in a training batch, on each device.
        evaluation_batch_size: images in an evaluation batch; null takes batch_size.
        workers: processes that read pictures, at most one per core.
        skip_broken: evaluate without the pictures that cannot be read, instead of stopping at the first.
        max_broken: stop training when more than this share of the pictures drawn so far by this process and its workers could not be
            read. Each picture counts once, and the check begins after 200 pictures, or after all of a smaller set.
    """

    def __init__(
        self,
        image_size: Size = 256,
        batch_size: int = 16,
        evaluation_batch_size: int | None = None,
        workers: int = 4,
        skip_broken: bool = False,
        max_broken: float = 0.2,
    ) -> None:
        super().__init__(batch_size, evaluation_batch_size, workers, collate)
        self.image_size, self.skip_broken = shortened(image_size), skip_broken
        if min(sides(image_size)) < 1:
            raise UserError(f"data.image_size {image_size}: give a positive number, or two for height and width")
        if not 0 <= max_broken <= 1:
            raise UserError(f"data.max_broken {max_broken}: give a share between 0 and 1")
        self.max_broken = max_broken

    @abstractmethod
    def training_set(self) -> PictureSet:
        """The pictures to train on, cropped at random."""

    @abstractmethod
    def evaluation_set(self) -> PictureSet:
        """The pictures to evaluate: the same tensors in the same order every time."""

    @cached_property
    def _training(self) -> Guarded:
        return Guarded(self.training_set(), "replace", self.max_broken)

    @cached_property
    def _evaluation(self) -> Guarded:
        return Guarded(self.evaluation_set(), "leave out" if self.skip_broken else "stop")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return as_images(batch)

    @property
    def loaded(self) -> list[Guarded]:
        """The picture sets used so far, with their broken pictures; the same sets on all ranks."""
        return [self.__dict__[name] for name in ("_training", "_evaluation") if name in self.__dict__]

    @property
    def skipped(self) -> int:
        """Number of broken pictures that this process and its workers left out, each counted once."""
        return sum(int(guarded.broken.count_nonzero()) for guarded in self.loaded)

    def protocol(self) -> dict[str, Any]:
        """Description of the evaluation set as plain data without machine paths, for comparing results."""
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
        """Names of the pictures in this rank's training batch; a broken one was replaced by the next readable one."""
        order = self._order()
        order.set_epoch(epoch)
        order.start = (self._training_loader or self.train_dataloader()).pictures_before(epoch, batch)
        return [self._training.pictures.name(index) for index, _ in islice(order, self.batch_size)]


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""From a picture set to batches: broken pictures are replaced, left out, or stop the run.

    PictureSet --Guarded--> Tensor | UserError | None --collate--> batch | UserError --Loader--> images, or raises

Pixels travel as uint8, a quarter of the bytes, until `as_images` converts them: in the data module's hook on the device, in the Loader
without a trainer.

Worker processes return errors as values, because a raised exception would arrive with a traceback in its message.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from gq_lightning.data.order import Place, Shuffled, random_numbers
from gq_lightning.data.pictures.reading import BrokenImage, as_images
from gq_lightning.data.sets import PictureSet
from gq_lightning.distributed import is_distributed
from gq_lightning.errors import UserError

logger = logging.getLogger("gq_lightning.data")

ENOUGH = 200  # pictures drawn before the share of broken ones is checked
WhenBroken = Literal["replace", "leave out", "stop"]


class Guarded(Dataset[Tensor | UserError | None]):
    """A picture set that warns about each broken picture once, and counts them.

    Args:
        when_broken: `replace` returns the next readable picture, `leave out` returns None, `stop` returns the error.
        max_broken: if more than this share of the pictures drawn are broken, `replace` returns an error. A picture counts as drawn only
            if it was requested, not if it replaced another. Otherwise the search for a replacement in one folder of broken pictures would
            make the whole set look broken.

    Attributes:
        broken, drawn: (len,) uint8 in memory shared with the worker processes, 1 for a broken and for a requested picture.
    """

    def __init__(self, pictures: PictureSet, when_broken: WhenBroken, max_broken: float = 1.0) -> None:
        self.pictures, self.when_broken, self.max_broken = pictures, when_broken, max_broken
        with torch.inference_mode(False):  # a validation may create these, and training must be able to write to them
            self.broken, self.drawn = (torch.zeros(len(pictures), dtype=torch.uint8).share_memory_() for _ in range(2))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int | Place) -> Tensor | UserError | None:
        """The picture with this index; for a place, cropped with the random numbers of the place."""
        index, seed = place if isinstance(place, tuple) else (place, None)
        with random_numbers(seed):
            return self._picture(index)

    def _picture(self, index: int) -> Tensor | UserError | None:
        self.drawn[index] = 1
        candidates = range(index, index + len(self)) if self.when_broken == "replace" else [index]
        for candidate in (candidate % len(self) for candidate in candidates):
            if not self.broken[candidate]:
                try:
                    return self.pictures.pixels(candidate)
                except BrokenImage as error:
                    if self.when_broken == "stop":
                        return error
                    self.broken[candidate] = 1
                    logger.warning("left out a broken picture: %s", error)
            if candidate == index and self.when_broken == "replace" and (too_many := self._too_many()) is not None:
                return too_many
        return None if self.when_broken == "leave out" else self.all_broken()

    def _too_many(self) -> UserError | None:
        drawn, broken = (int(flags.count_nonzero()) for flags in (self.drawn, self.drawn & self.broken))
        if drawn < min(ENOUGH, len(self)) or broken <= self.max_broken * drawn:
            return None
        share = f"{broken} of the {drawn} pictures of {self.pictures.split} drawn so far cannot be read"
        return UserError(f"{share}, more than data.max_broken {self.max_broken:g}: repair those that the warnings name, or raise it")

    def all_broken(self) -> UserError:
        return UserError(
            f"none of the {len(self)} pictures of {self.pictures.split} can be read, {self.pictures.name(0)} among them: see the warnings"
        )


def collate(items: list[Tensor | UserError | None]) -> Tensor | UserError:
    """A batch (B, 3, H, W), uint8 or float32, of the readable pictures (B may be 0), or the first error, which the loader raises."""
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    images = [item for item in items if item is not None]
    return default_collate(images) if images else torch.empty(0)


class Loader(DataLoader[Any]):
    """A DataLoader over a Guarded set. It raises the errors that its workers return, and skips empty batches.

    With a Shuffled sampler it is stateful in Lightning's sense: `state_dict` records the epoch and how many of its pictures all ranks
    have consumed, however far the workers have read ahead. After `load_state_dict` the epoch continues with the next picture, without
    reading the earlier ones, even with another batch size or number of ranks.

    Args:
        to_trainer: leave uint8 pixels as they are, for the data module's hook to convert them on the device.
    """

    _epoch = _pictures = 0  # the epoch, and its pictures consumed so far
    _resumed = (0, 0)  # the resumed epoch, and its pictures consumed before this loader was made

    def __init__(self, *arguments: Any, to_trainer: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.to_trainer = to_trainer

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        order = self.sampler if isinstance(self.sampler, Shuffled) else None
        if order is not None:
            epoch, start = self._resumed
            self._epoch, self._pictures = order.epoch, start if order.epoch == epoch else 0
            order.start = self._pictures
        empty = not self._pictures
        for batch in super().__iter__():
            self._pictures += self._global_batch if order is not None else 0
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:  # break the cycle between error and frame, which would keep the workers alive
                    del batch
            if len(batch):
                empty = False
                yield batch if self.to_trainer or not isinstance(batch, Tensor) else as_images(batch)
        if empty and isinstance(self.dataset, Guarded):
            if not is_distributed():
                raise self.dataset.all_broken()
            # only this rank's share may be empty, and the other ranks would wait for one that stops
            logger.warning("nothing to evaluate on a rank: none of its pictures of %s can be read", self.dataset.pictures.split)
        if order is not None:  # for loops without a trainer, which would set the epoch
            order.set_epoch(order.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "pictures": self._pictures}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # older checkpoints count batches, and can only be resumed with equal settings
        pictures = state["pictures"] if "pictures" in state else state["batches"] * self._global_batch
        self._epoch, self._pictures = self._resumed = state["epoch"], pictures

    def batches_before(self, epoch: int) -> int:
        """Batches of the epoch that count as done before this loader was made: all except those that remain."""
        resumed, start = self._resumed
        return len(self) - (len(self.dataset) - start) // self._global_batch if epoch == resumed else 0  # type: ignore[arg-type]

    def pictures_before(self, epoch: int, batch: int) -> int:
        """Pictures of the epoch that all ranks consume before the batch."""
        resumed, start = self._resumed
        return (batch - self.batches_before(epoch)) * self._global_batch + (start if epoch == resumed else 0)

    @property
    def _global_batch(self) -> int:
        return (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)


def heed_only_the_parent(_: int) -> None:
    """Makes a worker process ignore signals sent to its process group, but still end on SIGTERM from its parent.

    SLURM, `timeout` and others end a training by a signal to the process group. If a worker obeyed it, the training would fail before
    saving its checkpoint. torch ends a worker whose parent is gone.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    group = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, group)

    def listen() -> None:
        while True:
            received = signal.sigwaitinfo(group)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=listen, daemon=True, name="signals").start()

"""Finds pictures that occur in two sets, by their bytes, whatever their names and folders."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gq_lightning.data.pictures.progress import progress
from gq_lightning.data.sets import StoredSet

Mark = Callable[[StoredSet, int], int | bytes]
# in order of cost; each is computed only for the pictures that all earlier marks have matched
MARKS: dict[str, Mark] = {
    "sizes": lambda pictures, index: pictures.size(index),
    "ends": lambda pictures, index: hash(pictures.tail(index)),
    "contents": lambda pictures, index: hashlib.sha256(pictures.content(index)).digest(),
}
AT_A_TIME = 1000


def also_in(pictures: StoredSet, others: StoredSet) -> np.ndarray:
    """(len(pictures),) bool: whether a picture's bytes equal those of one of the others. Unreadable pictures match nothing."""
    mine, theirs = list(range(len(pictures))), list(range(len(others)))
    for what, mark in MARKS.items():
        with progress(f"comparing training with evaluation, {what}", len(mine) + len(theirs)) as advance:
            ours, known = (_marks(*side, mark, advance) for side in ((pictures, mine), (others, theirs)))
        common = set(ours.values()) & set(known.values())
        mine, theirs = ([index for index, value in marks.items() if value in common] for marks in (ours, known))
    shared = np.zeros(len(pictures), dtype=bool)
    shared[mine] = True
    return shared


def _marks(pictures: StoredSet, indices: list[int], mark: Mark, advance: Callable[[int], None]) -> dict[int, int | bytes]:
    def of(some: Iterable[int]) -> list[tuple[int, int | bytes]]:
        found = []
        for index in some:
            try:
                found.append((index, mark(pictures, index)))
            except OSError:
                continue
        return found

    marks: dict[int, int | bytes] = {}
    with ThreadPoolExecutor(pictures.readers) as readers:
        for found in readers.map(of, (indices[start : start + AT_A_TIME] for start in range(0, len(indices), AT_A_TIME))):
            marks.update(found)
            advance(len(found))
    return marks

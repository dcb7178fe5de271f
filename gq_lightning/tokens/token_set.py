"""Token sets: the tokens of many pictures in files that are mapped into memory.

FOLDER/set.json                        header, and the SHA-256 of every shard; written last, so a set with this file is complete
FOLDER/000000.npy, 000000.json, ...    numpy records (label, tokens) of some pictures; their names, and the pictures left out

The arrays are in numpy's plain format, which cannot contain code.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gq_lightning.construction import typed
from gq_lightning.data.order import Place
from gq_lightning.errors import UserError
from gq_lightning.files import open_regular, parse_json, write_whole

FORMAT = 1
HEADER = "set.json"
NO_CLASS = -1
LARGEST_RECORD = 2**31  # bytes of one picture's views, numpy's limit
AGAIN = "copy the set again, or make it with `python -m gq_lightning tokenize`"


@dataclass(frozen=True)
class Header:
    """Description of a token set. Sizes that no set can have raise ValueError.

    Attributes:
        grid: h, w and n of one picture's tokens (h, w, n), which are in [0, codebook_size).
        tokenizer: fingerprint of the tokenizer that made the tokens.
        classes: names of the classes, indexed by label; empty if the pictures have no classes.
        views: names of the views of each picture; the rows of a picture are its views, in this order.
        preparation: description of resizing and cropping.
        shards: number of pictures in each shard, and the SHA-256 of its two files.
        left_out: broken pictures by name, with the reason.
    """

    grid: tuple[int, int, int]
    codebook_size: int
    downsampling: int
    tokenizer: str
    classes: Sequence[str]
    views: Sequence[str]
    preparation: str
    split: str
    shards: Sequence[tuple[int, str, str]]
    left_out: Mapping[str, str]

    def __post_init__(self) -> None:
        sizes = [*self.grid, self.codebook_size, self.downsampling, len(self.views)]
        if min(sizes) < 1 or max(sizes) > 2**32 or 4 * math.prod(self.grid) * len(self.views) >= LARGEST_RECORD:
            raise ValueError("sizes that no token set has")

    @property
    def record(self) -> np.dtype:
        """The numpy type of one picture in a shard, little-endian."""
        integer = next(integer for integer, most in (("u1", 2**8), ("<u2", 2**16), ("<u4", 2**32)) if self.codebook_size <= most)
        return np.dtype([("label", "<i4"), ("tokens", integer, (len(self.views), *self.grid))])

    def write(self, folder: Path) -> None:
        """Writes the header atomically. Raises UserError."""
        content = {"format": FORMAT, **asdict(self)}
        write_whole(folder / HEADER, (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode("ascii"))

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """The header of a folder. Raises UserError if it is missing or damaged."""
        path = folder / HEADER
        try:
            content = read_json(path)
            if content.pop("sha256") != _digest(content) or content.pop("format") != FORMAT:
                raise ValueError("its checksum does not match")
            hints = get_type_hints(cls)
            header = cls(**{name: typed(name, value, hints.get(name, Any)) for name, value in content.items()})
            if min((pictures for pictures, _, _ in header.shards), default=0) < 0 or not any(pictures for pictures, _, _ in header.shards):
                raise ValueError("shards: no pictures")
            return header
        except FileNotFoundError as error:
            raise UserError(f"{path}: no token set, or an unfinished one: make it with `python -m gq_lightning tokenize`") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: damaged, or not a token set of this version ({reason}): {AGAIN}") from error


class TokenSet(Dataset[tuple[Tensor, int]]):
    """`set[i]` is (tokens (h, w, n) int64, label). The views of a picture are adjacent; a label of -1 means no class.

    The files are mapped into memory: the system reads pages on demand, and all processes share them.

    Args:
        path: the set's folder.
        tokenizer: required fingerprint of the tokenizer that made the set; None accepts any.
        first_view: use only the first view of each picture, for evaluation.
        verify: compare the checksums of all files, which reads them once; lengths are always compared.

    Attributes:
        header: description of the set.

    Raises:
        UserError: a file is missing, truncated or changed, or another tokenizer made the tokens.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None, first_view: bool = False, verify: bool = True) -> None:
        self.path, self.header = Path(path), Header.read(Path(path))
        if tokenizer is not None and tokenizer != self.header.tokenizer:
            theirs = f"its tokens were made by tokenizer {self.header.tokenizer[:12]}, not by {tokenizer[:12]}"
            raise UserError(f"{path}: {theirs}: give the tokenizer that made them, or tokenize the pictures again")
        self.views = 1 if first_view else len(self.header.views)
        self._ends = np.cumsum([0, *(pictures for pictures, _, _ in self.header.shards)])
        self._shards = [self._map(number, verify) for number in range(len(self.header.shards))]

    def __len__(self) -> int:
        return int(self._ends[-1]) * self.views

    def __getitem__(self, place: int | Place) -> tuple[Tensor, int]:
        """The row with this index; rows are not random, so a place's seed has no effect."""
        index = place[0] if isinstance(place, tuple) else place
        picture, view = divmod(range(len(self))[index], self.views)
        shard = int(np.searchsorted(self._ends, picture, side="right")) - 1
        row = self._shards[shard][picture - self._ends[shard]]
        return torch.from_numpy(row["tokens"][view].astype(np.int64)), int(row["label"])

    def name(self, index: int) -> str:
        """Name of the picture of a row."""
        return self._names[range(len(self))[index] // self.views]

    def counts(self) -> np.ndarray:
        """Number of occurrences of each token at each of the n places of a position: (n, codebook_size) int64."""
        n = self.header.grid[2]
        counts = np.zeros((n, self.header.codebook_size), dtype=np.int64)
        for shard in self._shards:
            for rows in np.array_split(shard["tokens"][:, : self.views], max(1, shard.nbytes >> 26)):
                counts += np.stack([np.bincount(rows[..., place].ravel(), minlength=self.header.codebook_size) for place in range(n)])
        return counts

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = []
        for number, shard in enumerate(self._shards):
            path = shard_path(self.path, number, "json")
            try:
                names += read_told(path).names
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: damaged ({error}): {AGAIN}") from error
            if len(names) != self._ends[number + 1]:
                raise UserError(f"{path}: does not name the {len(shard)} pictures of its shard: {AGAIN}")
        return names

    def _map(self, number: int, verify: bool) -> np.ndarray:
        pictures, *digests = self.header.shards[number]
        for suffix, digest in zip(("npy", "json"), digests, strict=True):
            path = shard_path(self.path, number, suffix)
            if not path.is_file():
                raise UserError(f"{path} is missing: {AGAIN}")
            if verify and sha256_of(path) != digest:
                raise UserError(f"{path}: truncated or changed, its SHA-256 is not the one in {HEADER}: {AGAIN}")
        rows = map_shard(path := shard_path(self.path, number, "npy"), pictures, self.header.record)
        if verify and len(rows):
            for name, lowest, highest in (("tokens", 0, self.header.codebook_size - 1), ("label", NO_CLASS, len(self.header.classes) - 1)):
                if not lowest <= int(rows[name].min()) <= int(rows[name].max()) <= highest:
                    raise UserError(f"{path}: {name} outside {lowest} to {highest}, the range in {HEADER}: {AGAIN}")
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # a spawned process maps the files itself, since a mapped array would be pickled completely
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shards = [self._map(number, verify=False) for number in range(len(self.header.shards))]


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    """Path of a shard's file, such as FOLDER/000000.npy."""
    return folder / f"{number:06d}.{suffix}"


def map_shard(path: Path, pictures: int, record: np.dtype) -> np.ndarray:
    """A shard's records, mapped into memory. Raises UserError unless the file has exactly `pictures` of them."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
        if rows.shape != (pictures,) or rows.dtype != record:
            raise ValueError("its records are not those of the set")
        return rows
    except Exception as error:  # numpy's reader of headers passes on what Python's tokenizer and parser raise
        raise UserError(f"{path}: truncated or damaged ({' '.join(str(error).split())[:100]}): {AGAIN}") from error


class Told(NamedTuple):
    """What a shard's JSON file says: the fingerprint of pictures and options, the SHA-256 of the array, the pictures, and the broken ones
    with the reason."""

    plan: str
    sha256: str
    names: Sequence[str]
    left_out: Mapping[str, str]


def read_told(path: Path) -> Told:
    """What a shard's JSON file says. Raises OSError or ValueError."""
    content = read_json(path)
    if not isinstance(content, dict) or content.keys() != set(Told._fields):
        raise ValueError(f"its fields are not {', '.join(Told._fields)}")
    return Told(**{name: typed(name, content[name], wanted) for name, wanted in get_type_hints(Told).items()})


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_json(path: Path) -> Any:
    """Parses a JSON file of the set. Raises OSError or ValueError."""
    with open_regular(path) as file:
        return parse_json(file.read())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""ADM's .npz files of pictures or of their statistics (https://github.com/openai/guided-diffusion/tree/main/evaluations).

arr_0 (N, H, W, 3) uint8, RGB; mu (2048), sigma (2048, 2048) of the pooled features; mu_s (2023), sigma_s (2023, 2023) of the spatial ones

Files are untrusted: an array's shape and type are checked before it is read, objects are never unpickled, and pictures are read in batches.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from gq_lightning.errors import UserError
from gq_lightning.files import open_regular
from gq_lightning.metrics.frechet import Moments

PICTURES = "arr_0"
LARGEST_SIDE = 2**12
POOLED, SPATIAL = 2048, 2023  # lengths of the means


class Archive:
    """An .npz file in ADM's format. Raises UserError if the file cannot be read, or has neither pictures nor statistics.

    Attributes:
        shape: N, H and W of its pictures; None if it has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape: tuple[int, int, int] | None = None
        with self._opened() as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            if not self.names >= {PICTURES} and not self.names >= {"mu", "sigma"}:
                raise ValueError("neither pictures (arr_0) nor statistics (mu and sigma)")
            if PICTURES in self.names:
                with archive.open(f"{PICTURES}.npy") as member:
                    shape = _header(member, (np.uint8,))
                if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or max(shape[1:3]) > LARGEST_SIDE:
                    raise ValueError(f"arr_0 has shape {shape}, not (N, H, W, 3)")
                self.shape = (shape[0], shape[1], shape[2])

    def batches(self, size: int) -> Iterator[Tensor]:
        """The pictures, (B, 3, H, W) uint8. Raises UserError."""
        assert self.shape is not None
        count, height, width = self.shape
        with self._opened() as archive, archive.open(f"{PICTURES}.npy") as member:
            _header(member, (np.uint8,))
            for begin in range(0, count, size):
                batch = min(size, count - begin)
                pixels = np.frombuffer(member.read(batch * height * width * 3), np.uint8).reshape(batch, height, width, 3)
                yield torch.from_numpy(pixels.copy()).movedim(-1, 1)

    def moments(self) -> tuple[Moments | None, Moments | None]:
        """Mean and covariance of the pooled and of the spatial features, None where the file has none. Raises UserError."""
        with self._opened() as archive:
            return self._moments(archive, "mu", "sigma", POOLED), self._moments(archive, "mu_s", "sigma_s", SPATIAL)

    def _moments(self, archive: zipfile.ZipFile, mean: str, covariance: str, length: int) -> Moments | None:
        if not {mean, covariance} & self.names:
            return None
        found = []
        for name, wanted in ((mean, (length,)), (covariance, (length, length))):
            with archive.open(f"{name}.npy") as member:
                if (shape := _header(member, (np.float32, np.float64))) != wanted:
                    raise ValueError(f"{name} has shape {shape}, not {wanted}")
            with archive.open(f"{name}.npy") as member:
                found.append(np.lib.format.read_array(member, allow_pickle=False).astype(np.float64))
            if not np.isfinite(found[-1]).all():
                raise ValueError(f"{name} has values that are not finite")
        if not np.allclose(found[1], found[1].T, rtol=1e-3, atol=1e-4) or (found[1].diagonal() < 0).any():
            raise ValueError(f"{covariance} is not a covariance")
        return found[0], found[1]

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
                yield archive
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file: give an .npz file in ADM's format, or a folder of pictures") from error
        except Exception as error:  # zipfile's and numpy's readers raise nearly every built-in exception on damaged files
            reason = " ".join((str(error) or type(error).__name__).split())[:150]
            raise UserError(f"{self.path}: damaged, or not in ADM's format ({reason}): download it again") from error


def _header(member: IO[bytes], types: tuple[type, ...]) -> tuple[int, ...]:
    """The shape of the array whose file this is, which is then at its first number. Raises ValueError for other types."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read[np.lib.format.read_magic(member)](member)
    if dtype not in types or (fortran and len(shape) > 2):
        raise ValueError(f"an array of {dtype}, not {' or '.join(np.dtype(kind).name for kind in types)}")
    return shape

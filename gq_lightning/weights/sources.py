"""Downloads the official weights from the URLs of torchvision and torch-fidelity."""

import hashlib
import pickle
import re
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

URLS = {
    "alexnet": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "inception": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
}
TIMEOUT = 5  # seconds without an answer


class SourceError(Exception):
    """A download that could not be reached or read; the message gives the reason."""


def download(name: str) -> dict[str, Tensor]:
    """The tensors of weights `name`. Raises SourceError."""
    return wanted(official(name))


def wanted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an official file that make up the canonical content."""
    ends = (".conv.weight", ".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var")
    return {key: value.detach().float().contiguous() for key, value in state.items() if key.startswith("features.") or key.endswith(ends)}


def official(name: str) -> dict[str, Tensor]:
    """All tensors of the official file of weights `name`, whose name gives the first digits of its SHA-256. Raises SourceError."""
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            TemporaryDirectory() as folder,
            urllib.request.urlopen(URLS[name], timeout=TIMEOUT) as response,
            Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True) as bar,
        ):
            file = Path(folder, "weights.pth")
            task = bar.add_task(name, total=int(response.headers.get("Content-Length") or 0) or None)
            with file.open("wb") as target:
                while chunk := response.read(1 << 18):
                    target.write(chunk)
                    bar.advance(task, len(chunk))
            digits = re.search(r"-([0-9a-f]{8})\.pth$", URLS[name])
            if digits and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(digits[1]):
                raise SourceError(f"the file from {URLS[name]} is damaged: its SHA-256 does not begin with {digits[1]}")
            with warnings.catch_warnings(action="ignore"):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, HTTPException) as error:
        raise SourceError(f"{URLS[name]} cannot be reached ({getattr(error, 'reason', error)})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SourceError(f"the file from {URLS[name]} cannot be read") from error

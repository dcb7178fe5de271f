"""The optional C++: made once, whole or not at all, and never needed."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gq_lightning.quantizers.search import best_codewords, blocked, compiled, table

CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no library loaded yet."""
    monkeypatch.setenv("GQ_LIGHTNING_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_loaded", {})
    return tmp_path / "compiled"


def needs_compiler() -> None:
    if not (compiled._has_avx2() and any(map(shutil.which, ("c++", "g++", "clang++")))):
        pytest.skip("no compiler, or no AVX2")


def test_compiled_once_at_the_first_search_that_is_worth_it(home: Path) -> None:
    needs_compiler()
    assert not table.usable(CPU, compile=False)
    assert not home.exists()
    assert table.usable(CPU, compile=True)
    (made,) = home.iterdir()
    before = made.stat().st_mtime_ns
    assert table.usable(CPU, compile=False)
    assert made.stat().st_mtime_ns == before


def test_two_processes_at_once(home: Path) -> None:
    needs_compiler()
    code = "from gq_lightning.quantizers.search import compiled; assert compiled.library('table') is not None"
    processes = [subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ)) for _ in range(2)]
    assert [process.wait() for process in processes] == [0] * 2
    assert [path.suffix for path in home.iterdir()] == [".so"]


@pytest.mark.parametrize("broken", ["no compiler", "a compiler that fails", "a cache that cannot be written", "switched off"])
def test_without_it_plain_torch_serves(broken: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    mean, variance, codebook = torch.randn(1200, 16), torch.rand(1200, 16) * 0.5 + 0.1, torch.randn(4096, 16)
    assert mean.numel() * len(codebook) >= 2**26
    expected = best_codewords(mean, variance, codebook.clone())
    compiled._loaded.clear()
    if broken == "no compiler":
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    elif broken == "a compiler that fails":
        monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
    elif broken == "a cache that cannot be written":
        (home.parent / "file").write_text("")
        monkeypatch.setenv("GQ_LIGHTNING_HOME", str(home.parent / "file"))
    else:
        monkeypatch.setenv("GQ_LIGHTNING_COMPILE", "0")
    shutil.rmtree(home, ignore_errors=True)
    assert not table.usable(CPU, compile=True)
    assert torch.equal(best_codewords(mean, variance, codebook), expected)
    assert not list(home.glob("*")) if home.exists() else True
    if broken != "switched off" and compiled._has_avx2():
        assert "plain torch" in caplog.text


@pytest.mark.parametrize("m", [4, 12, 16])
def test_without_avx512_the_tokens_are_the_same(m: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    if not torch.cpu._is_avx512_supported():
        pytest.skip("no AVX-512: there is one library alone")
    generator = torch.Generator().manual_seed(0)
    mean, codebook = torch.randn(300, m, generator=generator).double(), torch.randn(5000, m, generator=generator)
    precision = (torch.rand(300, m, generator=generator) * 0.5 + 0.05).double().reciprocal()
    monkeypatch.setattr(compiled, "_digest", compiled._digest.__wrapped__)
    with_it = table.best(mean, precision, codebook, 1.0, 5)
    monkeypatch.setattr(compiled, "AVX512", ())
    monkeypatch.setattr(compiled, "_loaded", {})
    without = table.best(mean, precision, codebook, 1.0, 5)
    assert len(list(home.iterdir())) == 2
    assert torch.equal(with_it, without)
    assert torch.equal(without, blocked.best(mean, precision, codebook, 1.0, 5))

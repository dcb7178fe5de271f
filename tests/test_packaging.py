"""What is installed works without the repository: the configs are in the wheel, and found from any folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import gq_lightning
from gq_lightning import UserError
from gq_lightning.cli.configs import find_config, packaged, with_configs

ROOT = Path(__file__).parents[1]
BOX = ROOT / "gq_lightning/box"
VERSION = re.compile(rf"""version\w* *= *["']{re.escape(gq_lightning.__version__)}["']|__version__ = ["']""")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))"


def build(what: str, source: Path, out: Path) -> Path:
    """A wheel or an sdist of a copy of the repository's own files: setuptools writes beside them."""
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(out)], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "absent from the `packages`" not in done.stderr, "setuptools will leave out a folder of data"
    return out / done.stdout.split()[-1]


def contents(wheel: Path) -> dict[str, int]:
    """Names and checksums, the list of them aside."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.filename.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("gq_lightning", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return build("wheel", copy, copy)


def test_the_wheel_has_all_files_and_the_configs(wheel: Path) -> None:
    found = set(contents(wheel))
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gq_lightning").rglob("*") if path.suffix in (".py", ".cpp", ".typed")}
    configs = {f"gq_lightning/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*") if path.is_file()}
    box = {path.relative_to(ROOT).as_posix() for path in BOX.rglob("*") if path.is_file()}
    assert len(configs) > 20 and len(box) >= 15 and any(name.endswith(".cpp") for name in code)
    assert code | configs | box | {"gq_lightning/py.typed"} <= found
    assert {name.split("/")[0].split("-")[0] for name in found} == {"gq_lightning"}
    entry_points = next(name for name in found if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "gq_lightning = gq_lightning.cli.main:main" in archive.read(entry_points).decode()


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    assert metadata["Version"] == gq_lightning.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    pythons = {f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")}
    assert pythons <= set(metadata.get_all("Classifier", []))


def test_the_version_stands_in_one_place() -> None:
    written = [
        path
        for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "gq_lightning").rglob("*.py"))
        if VERSION.search(path.read_text())
    ]
    assert written == [ROOT / "gq_lightning/__init__.py"]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", wheel.parent, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    assert contents(build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_an_installed_wheel_fits_and_sums_up_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(call, check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        call = [sys.executable, "-m", "gq_lightning", *arguments]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = "import gq_lightning; print(gq_lightning.__file__)"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert found.stdout.startswith(str(target))
    assert "--config" in run("fit", "--help")
    assert "parameters" in run("summary", "--config", "configs/demo.yaml")
    assert "image_size" in run("fit", "--config", "configs/demo.yaml", "--print_config")


def test_a_config_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged() == ROOT / "configs"
    assert find_config("configs/demo.yaml") == str(ROOT / "configs/demo.yaml")
    given = ["fit", "--config", "configs/demo.yaml", "--config=configs/scale/cpu.yaml", "--name", "configs/demo.yaml"]
    expected = ["fit", "--config", str(ROOT / "configs/demo.yaml"), f"--config={ROOT / 'configs/scale/cpu.yaml'}", "--name", given[-1]]
    assert with_configs(given) == expected
    # the user's own comes first
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("{}")
    assert find_config("configs/demo.yaml") == "configs/demo.yaml"
    for name in ("configs/demp.yaml", "demo.yaml", "/configs/demo.yaml", "../configs/demo.yaml"):
        with pytest.raises(UserError, match=r"no such config.*configs/demo\.yaml"):
            find_config(name)
    with pytest.raises(UserError, match="did you mean configs/quantizer/fsq.yaml"):
        find_config("configs/quantiser/fsq.yaml")
    with pytest.raises(UserError, match="correct the path"):
        find_config("/nowhere/zzzzzzzzzz.yaml")

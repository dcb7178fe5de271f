"""What a command or a user of tokens does not need is not imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import CONFIGS, small_tokenizer

from gq_lightning import data
from gq_lightning.cli import main

HEAVY = ("lightning", "lpips", "torchmetrics", "torch_fidelity", "scipy", "matplotlib", "tensorboard", "sklearn", "skimage", "timm")
# what neither a tokenizer nor a command's help needs; the compiler of torch takes as long to import as the rest of it
NEITHER = (*HEAVY, "vector_quantize_pytorch", "huggingface_hub", "torchvision", "torch._dynamo", "torch._inductor")
# modules at most: of a door, beyond those of torch and of python's start
MOST = {"import gq_lightning": 10, "from_pretrained and decode": 180, "--help": 60, "encode --help": 240}
# the ViT's blocks are timm's, and its package imports all its models and torchvision
VIT = ("timm", "torchvision", "huggingface_hub", "torch._dynamo", "torch._inductor")
# python SCRIPT MODULES ARGUMENTS [then ARGUMENTS]: the command line, where importing one of the modules fails
FORBIDDING = """
import sys
from importlib.machinery import ModuleSpec

class Forbid:
    # to ask whether a module is installed is no import
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.split(".")[0] in sys.argv[1].split(",") else None

    def create_module(self, spec):
        raise AssertionError(f"{spec.name} is imported")

    def exec_module(self, module): ...

sys.meta_path.insert(0, Forbid())
from gq_lightning.cli.main import main
calls = [[]]
for argument in sys.argv[2:]:
    calls.append([]) if argument == "then" else calls[-1].append(argument)
sys.exit(max(map(main, calls)))
"""
ROUND_TRIP = """
import sys
import torch
before = set(sys.modules)
import gq_lightning
from gq_lightning import ImageTokenizer
tokenizer = ImageTokenizer.from_pretrained(sys.argv[1])
images = torch.rand(1, 3, 32, 32) * 2 - 1
assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
print(*set(sys.modules) - before)
"""
# python -c COUNT ARGUMENTS: the modules that a command's help or an import loads
COUNT = """
import sys
before = set(sys.modules)
import gq_lightning
if sys.argv[1:]:
    import contextlib, io
    from gq_lightning.cli.main import main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(sys.argv[1:])
print(*set(sys.modules) - before)
"""


def hold(what: str, modules: set[str], capsys: pytest.CaptureFixture[str], besides: tuple[str, ...] = ()) -> None:
    with capsys.disabled():
        print(f"\n{what}: {len(modules)} modules")
    if not besides:
        assert len(modules) <= MOST[what], sorted(modules)
    names = {*modules, *(name.split(".")[0] for name in modules)}
    assert not names & (set(NEITHER) - set(besides))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module", params=["vit", "unet"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    small_tokenizer(request.param).save_pretrained(folder)
    return folder


def test_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("-c", ROUND_TRIP, folder)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "gq_lightning.tokenizer.module" in imported
    hold("from_pretrained and decode", imported, capsys, VIT if folder.name.startswith("vit") else ())


def test_the_package_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for what, arguments in (("import gq_lightning", []), ("--help", ["--help"]), ("encode --help", ["encode", "--help"])):
        done = run("-c", COUNT, *arguments)
        assert done.returncode == 0, done.stderr
        imported = set(done.stdout.split())
        hold(what, imported, capsys)
        assert not imported & {"torch", "numpy", "PIL", "gq_lightning.tokenizer"}


def test_encode_and_decode(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    heavy = [name for name in HEAVY if not (folder.name.startswith("vit") and name in VIT)]
    same = ("--tokenizer", folder, "--out", tmp_path / "out")
    calls = ("encode", tmp_path / "a.png", *same, "then", "decode", tmp_path / "out/a.png.tokens", *same)
    done = run("-c", FORBIDDING, ",".join(heavy), *calls)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.size == (33, 40)


def test_help_needs_no_torch() -> None:
    for arguments in ([], ["--help"]):
        done = run("-c", FORBIDDING, ",".join((*HEAVY, "torch", "numpy", "PIL", "jsonargparse", "torchvision")), *arguments)
        assert (done.returncode, done.stdout) == (0, main.usage()), done.stderr
    done = run("-c", FORBIDDING, "torch", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nonsense is not a command: use one of fit, validate")


@pytest.mark.parametrize("command", main.tools())
def test_help_of_a_tool(command: str) -> None:
    done = run("-c", FORBIDDING, ",".join((*HEAVY, "torch", "numpy", "PIL", "torchvision")), command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m gq_lightning {command}" in done.stdout


def test_the_guard_catches() -> None:
    done = run("-c", FORBIDDING, "lightning", "fit", "--help")
    assert done.returncode == 1
    assert "AssertionError: lightning is imported" in done.stderr


def test_public_names_of_the_data() -> None:
    for name in data.__all__:
        assert getattr(data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ImageFolders'"):
        data.ImageFolders  # noqa: B018

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
from gq_lightning.cli import main, tools
from gq_lightning.cli.training import CommandLine

HEAVY = ("lightning", "lpips", "torchmetrics", "torch_fidelity", "scipy", "matplotlib", "tensorboard", "sklearn", "skimage")
# python SCRIPT MODULES ARGUMENTS: the command line, where importing one of the modules fails
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
sys.exit(main(sys.argv[2:]))
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
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module", params=["vit", "unet"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    small_tokenizer(request.param).save_pretrained(folder)
    return folder


def test_a_tokenizer(folder: Path) -> None:
    done = run("-c", ROUND_TRIP, folder)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "gq_lightning" in imported
    assert not imported & {*HEAVY, "vector_quantize_pytorch"}
    # timm has the ViT's blocks, and brings torchvision along
    assert ("timm" in imported) == ("vit" in folder.name)


def test_encode_and_decode(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for arguments in (["encode", tmp_path / "a.png"], ["decode", tmp_path / "out/a.png.tokens"]):
        done = run("-c", FORBIDDING, ",".join(HEAVY), *arguments, "--tokenizer", folder, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.size == (33, 40)


def test_help_needs_no_torch() -> None:
    for arguments in ([], ["--help"]):
        done = run("-c", FORBIDDING, ",".join((*HEAVY, "torch", "numpy", "PIL", "jsonargparse", "timm", "torchvision")), *arguments)
        assert (done.returncode, done.stdout) == (0, main.HELP), done.stderr
    done = run("-c", FORBIDDING, "torch", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nonsense is no command; there are fit, validate")


def test_help_of_a_tool() -> None:
    # one parser has them all
    done = run("-c", FORBIDDING, ",".join((*HEAVY, "timm", "torchvision", "vector_quantize_pytorch")), "encode", "--help")
    assert done.returncode == 0, done.stderr
    assert "encode [-h]" in done.stdout


def test_the_guard_catches() -> None:
    done = run("-c", FORBIDDING, "lightning", "fit", "--help")
    assert done.returncode == 1
    assert "AssertionError: lightning is imported" in done.stderr


def test_all_commands_are_known_by_name() -> None:
    assert set(main.TRAINING) == {*CommandLine.subcommands(), "summary"}
    actions = [action for action in tools._parser()._actions if action.dest == "command"]
    assert tuple(actions[0].choices or ()) == main.TOOLS
    listed = [line.split()[0] for line in main.HELP.splitlines() if line.startswith("  ")]
    assert listed == [*main.TRAINING, *main.TOOLS]


def test_public_names_of_the_data() -> None:
    for name in data.__all__:
        assert getattr(data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ImageFolders'"):
        data.ImageFolders  # noqa: B018

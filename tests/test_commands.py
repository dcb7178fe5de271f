"""Every command's options, one by one: with a sensible value they work, with nonsense they are one line and exit 2, Ctrl-C is 130."""

import inspect
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import CONFIGS, small_training
from test_published import write

from gq_lightning.cli import commands
from gq_lightning.cli.main import TRAINING, main, tools
from gq_lightning.cli.signature import parse, parser_of
from gq_lightning.cli.training import CommandLine
from gq_lightning.priors import Prior
from gq_lightning.quantizers import GaussianQuantizer

# of each command: a call that works, and of each option a value that works (None: a switch) and values that do not
NUMBER = ["0", "-1", "x", "1.5", "99999999999999999999", ""]
# options and commands ("command *") of which a working call takes long or never ends; other tests run them
ONLY_PARSED = {
    "evaluate rfid",
    "evaluate generated",
    "evaluate reference",
    "encode refine_lpips",
    "convert from_diffusers",
    "convert bits",
    "convert data",
    "export *",
    "web *",
}
DEVICE = ("cpu", ["foo", "cuda:99", "meta", ""])
THREADS = ("1", NUMBER)
TOKENIZER = ("{tokenizer}", ["{none}", "{picture}", "{pictures}", ""])
FOLDER = ("{new}", ["{picture}/below", "/proc/nowhere/out"])
TILE = ("32", [*NUMBER, "33"])
SWITCH: tuple[None, list[str]] = (None, ["=maybe"])
CALLS: dict[str, tuple[list[str], dict[str, tuple[str | None, list[str]]]]] = {
    "convert": (
        ["{checkpoint}", "--out={new}"],
        {
            "source": ("{checkpoint}", ["{none}", "{picture}", "{pictures}"]),
            "out": FOLDER,
            "codebook": ("iid", ["x", ""]),
            "codebook_size": ("16", [*NUMBER, "3"]),
            "prior_weight": ("0.5", ["-1", "x", "nan", "inf", "7"]),
            "seed": ("3", ["x", "1.5", "99999999999999999999999"]),
            "order": ("tree", ["x", ""]),
            # in place of the source
            "from_diffusers": ("{tokenizer} --bits=16", ["{none} --bits=16", "{tokenizer}"]),
            "bits": ("16 --from_diffusers={tokenizer}", [*NUMBER, "16"]),
            "data": ("{pictures}", ["{none}"]),
        },
    ),
    "decode": (
        ["{tokens}", "--tokenizer={tokenizer}", "--out={new}"],
        {
            "tokens": ("{tokens}", ["{none}", "{picture}", "{pictures}"]),
            "tokenizer": TOKENIZER,
            "out": FOLDER,
            "tile": TILE,
            "any_tokenizer": SWITCH,
            "prior": ("{prior}", ["{none}", "{picture}", "{tokenizer}", ""]),
            "device": DEVICE,
            "threads": THREADS,
        },
    ),
    "encode": (
        ["{picture}", "--tokenizer={tokenizer}", "--out={new}"],
        {
            "images": ("{pictures}", ["{none}", "{tokens}", "{empty}"]),
            "tokenizer": TOKENIZER,
            "out": FOLDER,
            "fit": ("crop", ["x", "resize"]),
            "size": ("32 --fit=resize", [f"{size} --fit=resize" for size in [*NUMBER, "33"] if size] + ["32"]),
            "deterministic": SWITCH,
            "tile": TILE,
            "skip_broken": SWITCH,
            "bits": ("4 --tokenizer={tree}", [*NUMBER, "4"]),
            "refine": ("1", [number for number in NUMBER if number not in ("0", "99999999999999999999")]),
            "refine_lpips": ("0.1 --refine=1", [*(f"{weight} --refine=1" for weight in ("0", "-1", "x", "nan", "inf")), "0.1"]),
            "prior": ("{prior}", ["{none}", "{picture}", "{tokenizer}", ""]),
            "device": DEVICE,
            "threads": THREADS,
        },
    ),
    "evaluate": (
        ["--tokenizer={tokenizer}", "--data={pictures}", "--out={new}", "--no_rfid", "--workers=0", "--size=32"],
        {
            "tokenizer": TOKENIZER,
            "data": ("{pictures}", ["{none}", "{picture}", "{empty}"]),
            # in place of tokenizer and data
            "generated": ("{pictures}", ["{pictures}", "{none}"]),
            "reference": ("{pictures}", ["{pictures}", "{none}"]),
            "out": FOLDER,
            "size": ("whole", [*NUMBER, "33", "part", "[32,33]", "[32]"]),
            "tile": TILE,
            "batch_size": ("1", [number for number in NUMBER if not number.startswith("9")]),
            "workers": ("0", ["-1", "x", "1.5", ""]),
            "rfid": SWITCH,
            "gaussian": SWITCH,
            "skip_broken": SWITCH,
            "device": DEVICE,
            "threads": THREADS,
        },
    ),
    "export": (
        ["--tokenizer={tokenizer}", "--out={new}"],
        {
            "tokenizer": TOKENIZER,
            "out": FOLDER,
            "format": ("torch", ["x", ""]),
            "threads": THREADS,
        },
    ),
    "generate": (
        ["--prior={prior}", "--out={new}", "--count=1"],
        {
            "prior": ("{prior}", ["{none}", "{picture}", "{tokenizer}", ""]),
            "out": FOLDER,
            "count": ("2", [number for number in NUMBER if not number.startswith("9")]),
            "classes": ("1,cat", ["2", "cow", "cat,", ""]),
            "tokenizer": TOKENIZER,
            "from_": ("{picture}", ["{none}", "{tokens}", "{pictures}"]),
            "keep": ("0.25 --from={picture}", [f"{keep} --from={{picture}}" for keep in ("-1", "1.1", "x", "nan")]),
            "cfg": ("2", ["-1", "x", "nan", "inf", ""]),
            "top_k": ("3", NUMBER[:-2]),
            "top_p": ("0.9", ["0", "1.1", "nan", "x", ""]),
            "temperature": ("2", ["0", "-1", "nan", "inf", "x", ""]),
            "seed": ("3", ["-1", "x", "1.5", ""]),
            "batch_size": ("1", [number for number in NUMBER if not number.startswith("9")]),
            "device": DEVICE,
            "threads": THREADS,
        },
    ),
    "import-checkpoint": (
        ["{authors}", "--backbone=unet", "--bits_per_position=16", "--config={config}", "--codebook_size=256", "--out={new}"],
        {
            "checkpoint": ("{authors}", ["{none}", "{picture}", "{pictures}", "{checkpoint}"]),
            "backbone": ("unet", ["vit", "x"]),
            "bits_per_position": ("16", [*NUMBER, "24"]),
            "out": FOLDER,
            "codebook_size": ("256", [*NUMBER, "3"]),
            "config": ("{config}", ["{none}.yaml", "{picture}", "{pictures}", "configs/backbone/vit.yaml", ""]),
        },
    ),
    "models": ([], {}),
    "shard": (
        ["{pictures}", "--out={new}", "--workers=0"],
        {
            "folder": ("{pictures}", ["{none}", "{picture}", "{empty}"]),
            "out": FOLDER,
            "split": ("val", ["a/b", "..", ".x", ""]),
            "size": ("1", ["0", "-1", "x", "nan", ""]),
            "broken": ("keep", ["x", ""]),
            "workers": ("0", ["-1", "x", "1.5", ""]),
        },
    ),
    "web": (
        [],
        {
            "tokenizer": TOKENIZER,
            "prior": ("{prior}", ["{none}", "{picture}", "{tokenizer}", ""]),
            "address": ("127.0.0.1", ["nowhere.invalid", "192.0.2.1"]),
            "port": ("8000", NUMBER),
            "device": DEVICE,
            "threads": THREADS,
        },
    ),
    "weights": ([], {}),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("commands")
    found = {name: root / name for name in ("tokenizer", "pictures", "empty", "none")}
    found |= {"picture": root / "pictures/a.png", "tokens": root / "a.png.tokens", "checkpoint": root / "last.ckpt"}
    found["pictures"].mkdir()
    found["empty"].mkdir()
    (root / "authors").mkdir()
    Image.linear_gradient("L").resize((40, 33)).save(found["picture"])
    training = small_training("unet")
    training.tokenizer.eval().save_pretrained(found["tokenizer"])
    torch.save({"tokenizer": training.tokenizer.description(), "state_dict": training.state_dict()}, found["checkpoint"])
    prior = Prior((4, 4, 2), 256, 8, training.tokenizer.fingerprint, ["cat", "dog"], width=16, layers=1, heads=2, head_layers=1)
    prior.save_pretrained(root / "prior")
    training.tokenizer.save_pretrained(root / "prior/tokenizer")
    found["prior"] = root / "prior"
    found["tree"] = root / "tree"
    order = GaussianQuantizer(16, latent_channels=4, codebook_size=256, order="tree")
    small_training("unet", order).tokenizer.eval().save_pretrained(found["tree"])
    found["authors"], found["config"] = write(root / "authors", "unet")
    assert main(["encode", f"--tokenizer={found['tokenizer']}", str(found["picture"]), f"--out={root}"]) == 0
    return found


def line_of(command: str, paths: dict[str, Any], new: Path, option: str | None = None, value: str | None = None) -> list[str]:
    """The command's line, with an option replaced or added."""
    base, _ = CALLS[command]
    module = import_module(f"{commands.__name__}.{command.replace('-', '_')}")
    if option is not None:
        kind = inspect.signature(module.run).parameters[option].kind
        if kind is not inspect.Parameter.KEYWORD_ONLY:
            assert value is not None
            base = [value, *base[1:]]
        else:
            option = option.rstrip("_")
            written = f"--{option}" if value is None else f"--{option}{value}" if value.startswith("=") else f"--{option}={value}"
            extra = written.split(" ")
            base = [text for text in base if not text.startswith((f"--{option}=", f"--no_{option}"))] + extra
    return [command, *(text.format(**paths, new=new) for text in base)]


def test_every_command_and_option_is_here() -> None:
    assert list(CALLS) == list(tools())
    for command, (_, options) in CALLS.items():
        module = import_module(f"{commands.__name__}.{command.replace('-', '_')}")
        assert list(options) == list(inspect.signature(module.run).parameters), command
        shown = parser_of(module.run, command).format_help()
        for name in options:
            assert name.rstrip("_") in shown


@pytest.mark.parametrize(("command", "option"), [(command, option) for command, (_, options) in CALLS.items() for option in options])
def test_every_option(command: str, option: str, paths: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = CALLS[command][1][option]
    line = line_of(command, paths, tmp_path / "good", option, good)
    if {f"{command} {option}", f"{command} *"} & ONLY_PARSED:
        assert parse(import_module(f"{commands.__name__}.{command}").run, command, line[1:])
    else:
        assert main(line) == 0, (line, capfd.readouterr().err)
    for value in bad:
        capfd.readouterr()
        line = line_of(command, paths, tmp_path / "bad", option, value)
        assert main(line) == 2, line
        error = capfd.readouterr().err.strip().splitlines()
        assert error[-1].startswith("error: "), (line, error)
        assert "Traceback" not in "\n".join(error)
        assert len(error[-1]) > len("error: ") + 5, line
        assert not (tmp_path / "bad").is_file(), line
    torch.set_num_threads(1)


@pytest.mark.parametrize("command", tools())
def test_unknown_and_missing_arguments(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for line in ([command, "--nonsense"], *([[command]] if CALLS[command][0] else [])):
        assert main(line) == 2
        (error,) = capfd.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert f"python -m gq_lightning {command} --help" in error


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encode", "shard"])
@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c(command: str, workers: int, paths: dict[str, Any], tmp_path: Path) -> None:
    """The terminal sends it to the command and to its workers."""
    if command == "encode" and workers:
        return
    many = tmp_path / "many"
    many.mkdir()
    for index in range(3000):
        os.link(paths["picture"], many / f"{index}.png")
    line = [command, str(many), f"--out={tmp_path / 'out'}"]
    line += [f"--tokenizer={paths['tokenizer']}", "--threads=1"] if command == "encode" else [f"--workers={workers}", "--size=0.01"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gq_lightning", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out").is_dir() or len(list((tmp_path / "out").iterdir())) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip() == "interrupted"
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_a_file_more_is_a_command_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = '''"""Say how often a word is there."""

import not_yet_there


def run(word: str, /, *, times: int = 2, loud: bool = False) -> None:
    """Say a word.

    Args:
        word: what to say
        times: how often
        loud: in capitals
    """
    print(" ".join([word.upper() if loud else word] * times))
'''
    (tmp_path / "say_again.py").write_text(text)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    # to be listed it is not imported
    assert tools()["say-again"] == "Say how often a word is there."
    assert main(["--help"]) == 0
    assert "\n  say-again         Say how often a word is there.\n" in capsys.readouterr().out
    (tmp_path / "say_again.py").write_text(text.replace("import not_yet_there\n", ""))
    assert main(["say-again", "well", "--times", "3", "--loud"]) == 0
    assert capsys.readouterr().out == "WELL WELL WELL\n"


def test_a_parameter_without_a_description_is_named() -> None:
    def run(word: str, /, *, loud: bool = False) -> None:
        """Say a word.

        Args:
            word: what to say
        """

    with pytest.raises(TypeError, match=r"run: describe loud under `Args:` in its docstring"):
        parser_of(run, "say")


def test_the_training_commands_are_lightning_s_and_summary() -> None:
    assert set(TRAINING) == {*CommandLine.subcommands(), "summary"}

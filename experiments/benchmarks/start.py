"""How long does a command take to begin? Ratios to `import torch`, all in new processes, which take turns; medians.

Processor seconds, user and system, of one thread: nothing is waited for here, and a busy machine changes them less.

    python experiments/benchmarks/start.py [--out FILE] [--repeats 5] [--without-fit]

import        from gq_lightning import ImageTokenizer
help          python -m gq_lightning --help
wrong         python -m gq_lightning with a command that there is not
tool help     python -m gq_lightning encode --help
fit help      python -m gq_lightning fit --help; beside it, importing Lightning's command line
encode        python -m gq_lightning encode of one picture of 32x32 pixels, by a small UNet
decode        python -m gq_lightning decode of its tokens

All but `fit help` are compared with `import torch`, that with importing Lightning's command line.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine, write_ratios
from PIL import Image

from gq_lightning import ImageTokenizer
from gq_lightning.backbones import UNet
from gq_lightning.quantizers import GaussianQuantizer

WANTED = {"import": 1.1, "help": 0.1, "wrong": 0.1, "fit help": 1.1, "encode": 1.8}
ROOT = Path(__file__).parents[2]


def calls(folder: Path) -> dict[str, list[str]]:
    """By name, the arguments of python."""
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256)
    widths = {"encoder_channels": quantizer.encoder_channels, "latent_channels": quantizer.latent_channels}
    backbone = UNet(**widths, channels=32, multipliers=[1, 1, 1, 1], blocks=1, attention_resolutions=[4], image_size=32)
    ImageTokenizer(backbone, quantizer).eval().save_pretrained(folder / "tokenizer")
    Image.linear_gradient("L").resize((32, 32)).save(folder / "a.png")
    command = ["-m", "gq_lightning"]
    tokenizer = ["--tokenizer", str(folder / "tokenizer"), "--device", "cpu", "--out", str(folder / "out")]
    return {
        "torch": ["-c", "import torch"],
        "lightning": ["-c", "import lightning.pytorch.cli"],
        "import": ["-c", "from gq_lightning import ImageTokenizer"],
        "help": [*command, "--help"],
        "wrong": [*command, "encod"],
        "tool help": [*command, "encode", "--help"],
        "fit help": [*command, "fit", "--help"],
        "encode": [*command, "encode", str(folder / "a.png"), *tokenizer],
        "decode": [*command, "decode", str(folder / "out/a.png.tokens.safetensors"), *tokenizer],
    }


def seconds(arguments: list[str]) -> float:
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    if done.returncode not in (0, 2) or b"Traceback" in done.stderr:
        raise SystemExit(done.stderr.decode())
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/benchmarks/start.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-fit", action="store_true", help="leave out Lightning, which takes longest")
    arguments = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        forms = calls(Path(folder))
        if arguments.without_fit:
            del forms["lightning"], forms["fit help"]
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for repeat in range(arguments.repeats + 1):
            for name, form in forms.items():
                if (measured := seconds(form)) and repeat:  # the first one fills the caches
                    taken[name].append(measured)
    median = {name: statistics.median(values) for name, values in taken.items()}
    ratios = {name: value / median["torch"] for name, value in median.items() if name not in ("torch", "fit help")}
    if not arguments.without_fit:
        ratios["fit help"] = median["fit help"] / median["lightning"]
    content = {"machine": machine(), "seconds": {name: round(value, 3) for name, value in median.items()}}
    write_ratios(content, arguments.out, ratios, WANTED)


if __name__ == "__main__":
    main()

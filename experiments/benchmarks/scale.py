"""What docs/scaling.md is computed from: FLOPs of a whole training step at the paper's size, bytes of an all-reduce, and a checkpoint's
size and seconds, for both backbones.

    python experiments/benchmarks/scale.py [--out FILE] [--folder FOLDER]

One step of the shipped configs is made on the CPU, with one image, discriminator included, and all that torch computes in it is counted
(2 FLOPs per multiply-accumulate; convolutions, linear layers, attention). The checkpoint is that of the trainer after it, written to
--folder as a training writes it, synchronised with the disk, and read back. Each backbone has a process of its own.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from loader import write_photographs
from machine import machine, write
from rich.console import Console
from rich.table import Table
from step import CONFIGS, ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gq_lightning.cli.training import CommandLine

OUT = ROOT / "experiments/results/benchmarks/scale.json"
IMAGES, REPEATS = 1, 3


class Count(Callback):
    """FLOPs of the first training step; Lightning's own loop would be in the way of a context manager."""

    def __init__(self) -> None:
        self.counter, self._open = FlopCounterMode(display=False), contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # the CPU's fused attention is unknown to the counter
        self._open.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._open.enter_context(self.counter)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._open.close()


def measure(backbone: str, folder: Path) -> dict[str, Any]:
    """One backbone, in this process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_photographs(Path(place, "pictures"), 2)
        arguments = [word for config in CONFIGS["paper", backbone] for word in ("--config", str(ROOT / config))]
        arguments += ["--runs", place, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
        arguments += ["--data.init_args.root", f"{place}/pictures", "--data.init_args.batch_size", str(IMAGES), "--trainer.max_steps", "1"]
        arguments += ["--model.adversary.start", "0", "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
        # the end of a fit is no part of a step
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
        cli = CommandLine(arguments, run=False)
        trainer, model = cli.trainer, cli.model
        count = Count()
        trainer.callbacks = [
            callback for callback in trainer.callbacks if type(callback).__name__ not in ("GaussianQuant", "Export", "LastCheckpoint")
        ]  # type: ignore[attr-defined]
        trainer.callbacks.append(count)
        trainer.fit(model, cli.datamodule)
        path, seconds = Path(place, "checkpoints/last.ckpt"), []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            trainer.save_checkpoint(path, weights_only=False)
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        torch.load(path, weights_only=True)
        read = time.perf_counter() - begin
        size = path.stat().st_size
    judged = sum(parameter.numel() for parameter in model.adversary.parameters())
    generator = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - judged
    return {
        "backbone": backbone,
        "image_size": cli.datamodule.image_size,
        "parameters": {"generator": generator, "discriminator": judged},
        "training_flops_per_image": count.counter.get_total_flops() / IMAGES,
        "gradient_bytes": 4 * (generator + judged),
        "checkpoint": {"bytes": size, "write_seconds": [round(value, 2) for value in seconds], "read_seconds": round(read, 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts and times what the cost of many GPUs follows from.")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are written: the disk that counts"
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        write(measure(options.alone, options.folder), options.out)
        return
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for backbone in ("vit", "unet"):
            result = Path(place, f"{backbone}.json")
            call = [sys.executable, __file__, "--alone", backbone, "--out", str(result), "--folder", str(options.folder)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{backbone}: exit status {done.returncode}\n{done.stderr[-3000:]}")
            runs.append(json.loads(result.read_text()))
    write({"machine": machine(), "runs": runs}, options.out)
    table = Table("", *(run["backbone"] for run in runs), title="a training step at the paper's size")
    for heading, read in (
        ("TFLOPs per image", lambda run: f"{run['training_flops_per_image'] / 1e12:.2f}"),
        ("gradients of a step, MB", lambda run: f"{run['gradient_bytes'] / 1e6:.0f}"),
        ("checkpoint, GB", lambda run: f"{run['checkpoint']['bytes'] / 1e9:.2f}"),
        ("checkpoint written, s", lambda run: f"{min(run['checkpoint']['write_seconds'])} to {max(run['checkpoint']['write_seconds'])}"),
        ("checkpoint read, s", lambda run: f"{run['checkpoint']['read_seconds']}"),
    ):
        table.add_row(heading, *map(read, runs))
    Console().print(table)


if __name__ == "__main__":
    main()

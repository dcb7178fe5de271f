"""What does a step of training cost, part by part? Time and peak memory, at the demo's scale and at the paper's, with both backbones.

    python experiments/benchmarks/step.py [--out FILE] [--scale demo] [--backbone unet] [--steps N]

The trainer of the command line runs the steps of the shipped configs, each combination in a process of its own; --scale and --backbone
may be given several times, and default to all. At the paper's size the discriminator works from the first step, as it does for all but
2 % of the published run, and a step has one image on a CPU (16, as published, on a GPU).

Time within a part counts for the innermost part alone, so that the parts add up to the step; `trainer` is what remains. Every second
step is written to the logger, and a step's cost is that of the other ones and its share of a written one, as often as the config has it
written. Medians. On a GPU each part is waited for, which keeps parts from overlapping as they otherwise would. `peak` is the largest
resident memory (on a GPU, the allocated) while in that part. Writes the JSON file and, beside it, a PNG.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import Profiler
from loader import write_photographs
from machine import machine, peak, write
from rich.console import Console
from rich.table import Table

from gq_lightning.callbacks import TDC
from gq_lightning.cli.training import CommandLine
from gq_lightning.files import whole_file
from gq_lightning.training import module as training

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()  # asked once: it takes part of a millisecond
PARTS = {
    "data": "#999999",
    "encoder": "#0072B2",
    "sampling and penalty": "#009E73",
    "decoder": "#56B4E9",
    "pixel loss": "#F0E442",
    "LPIPS": "#E69F00",
    "adversary": "#CC79A7",
    "backward": "#D55E00",
    "optimizer": "#6A3D9A",
    "TDC update": "#B2182B",
    "logging": "#4D4D4D",
    "trainer": "#DDDDDD",
}
BOOKKEEPING = ("TDC update", "logging")
# steps that are not counted (allocators, caches, the optimizer's state), steps that are, and more at whose memory we look: that takes
# tenths of a millisecond each time, which is much beside a part of the demo and nothing beside a part of the paper's step
WARM_UP, STEPS, LOOKED_AT = {"demo": 6, "paper": 1}, {"demo": 60, "paper": 2}, {"demo": 2, "paper": 0}
CONFIGS = {
    # under TDC, to see what it costs
    ("demo", "vit"): ["configs/demo.yaml", "configs/quantizer/gq.yaml"],
    ("demo", "unet"): ["configs/demo.yaml", "configs/demo_unet.yaml", "configs/quantizer/gq.yaml"],
    ("paper", "vit"): ["configs/base.yaml", "configs/backbone/vit.yaml", "configs/scale/paper.yaml"],
    ("paper", "unet"): ["configs/base.yaml", "configs/backbone/unet.yaml", "configs/scale/paper.yaml"],
}


class Done(Exception):
    """Enough steps: what a fit does at its end is no part of one."""


class Parts(Profiler):
    """Lightning calls it around the data, and wrapped functions call it: a stack of open parts, the innermost pays.

    Args:
        steps: after which it raises Done.
        looked_at: how many of them, the last ones, have their memory looked at.
    """

    def __init__(self, steps: int, looked_at: int) -> None:
        super().__init__()
        self.count, self.unseen, self.steps = steps, steps - looked_at, list[dict[str, float]]()
        self.peaks: dict[str, float] = defaultdict(float)
        self.peak = 0.0
        self._open, self._since = ["trainer"], 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._boundary()
            if len(self.steps) == self.count:
                raise Done
            if len(self.steps) == self.unseen:
                self.peak = peak()  # of all before; from here on, of each part
            self.steps.append(defaultdict(float))
        if (part := _part(action_name)) is not None:
            self.enter(part)

    def stop(self, action_name: str) -> None:
        if _part(action_name) is not None and len(self._open) > 1:
            self.leave()

    def enter(self, part: str) -> None:
        self._boundary()
        self._open.append(part)

    def leave(self) -> None:
        self._boundary()
        self._open.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Has `owner.name(...)` counted as that part."""
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, counted)

    def _boundary(self) -> None:
        if CUDA:
            torch.cuda.synchronize()
        if self.steps:
            part = self._open[-1]
            self.steps[-1][part] += time.perf_counter() - self._since
            if len(self.steps) > self.unseen:
                self.peaks[part] = max(self.peaks[part], peak())
        self._since = time.perf_counter()  # what the look at the memory took is no part's


def _part(action: str) -> str | None:
    """The part that one of Lightning's actions belongs to."""
    return "data" if action.endswith(("train_dataloader_next", ".batch_to_device")) else None


def measure(scale: str, backbone: str, steps: int) -> dict[str, Any]:
    """One combination, in this process."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [word for config in CONFIGS[scale, backbone] for word in ("--config", str(ROOT / config))]
        arguments += ["--runs", folder, "--trainer.accelerator", "gpu" if CUDA else "cpu", "--trainer.devices", "1"]
        counted = WARM_UP[scale] + steps
        total = counted + LOOKED_AT[scale]
        if scale == "paper":
            batch = 16 if CUDA else 1
            write_photographs(Path(folder, "pictures"), (total + 2) * batch)
            arguments += ["--data.init_args.root", f"{folder}/pictures", "--data.init_args.batch_size", str(batch)]
            arguments += ["--model.adversary.start", "0"]
        arguments += ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
        cli = CommandLine(arguments, run=False)
        parts = instrument(cli, Parts(total, LOOKED_AT[scale] or steps))
        written_every, cli.trainer.log_every_n_steps = cli.trainer.log_every_n_steps, 2  # type: ignore[attr-defined]
        with contextlib.suppress(Done):
            cli.trainer.fit(cli.model, cli.datamodule)
        model = cli.model
        return {
            "scale": scale,
            "backbone": backbone,
            "parameters": sum(parameter.numel() for parameter in model.tokenizer.backbone.parameters()),
            "image_size": cli.datamodule.image_size,
            "batch_size": cli.datamodule.batch_size,
            "precision": cli.trainer.precision,
            "written_every": written_every,
            **summary(parts, slice(WARM_UP[scale], counted), written_every),
        }


def instrument(cli: CommandLine, parts: Parts) -> Parts:
    """Has the methods of the model, its trainer and its callbacks counted."""
    model = cli.model
    cli.trainer.profiler = parts  # type: ignore[attr-defined]
    for owner, name, part in (
        (model.tokenizer.backbone, "encode", "encoder"),
        (model.tokenizer.quantizer, "forward", "sampling and penalty"),
        (model.tokenizer.backbone, "decode", "decoder"),
        (model.loss, "forward", "pixel loss"),
        (model.loss.lpips, "forward", "LPIPS"),
        (torch.Tensor, "backward", "backward"),
        (training, "take_step", "optimizer"),
        (model, "log", "logging"),
        (model, "log_dict", "logging"),
        (cli.trainer._logger_connector, "update_train_step_metrics", "logging"),
        (cli.trainer._logger_connector, "on_batch_end", "logging"),
    ):
        parts.wrap(owner, name, part)
    for name in ("generator_loss", "discriminator_loss") if model.adversary is not None else ():
        parts.wrap(model.adversary, name, "adversary")
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        for name in ("on_train_batch_start", "on_train_batch_end"):
            if getattr(type(callback), name) is not getattr(Callback, name):
                parts.wrap(callback, name, "TDC update" if isinstance(callback, TDC) else "logging")
    return parts


def summary(parts: Parts, counted: slice, written_every: int) -> dict[str, Any]:
    """Milliseconds, shares and peaks of the parts, and of the step as a whole."""
    numbered = list(enumerate(parts.steps, start=1))[counted]
    plain, written = ([step for number, step in numbered if number % 2 == rest] for rest in (1, 0))

    def cost(read: Callable[[dict[str, float]], float]) -> float:
        usual, seldom = (statistics.median(map(read, steps)) * 1000 for steps in (plain or written, written or plain))
        return usual + (seldom - usual) / written_every

    costs = {part: cost(lambda step, part=part: step.get(part, 0.0)) for part in PARTS}
    total = sum(costs.values())
    return {
        "steps": len(numbered),
        "step_ms": round(total, 3),
        "median_step_ms": round(cost(lambda step: sum(step.values())), 3),
        "bookkeeping_share": round(sum(costs[part] for part in BOOKKEEPING) / total, 5),
        "peak_mib": round(max(parts.peak, *parts.peaks.values()), 1),
        "parts": {
            part: {"ms": round(costs[part], 3), "share": round(costs[part] / total, 5), "peak_mib": round(parts.peaks[part], 1)}
            for part in PARTS
        },
    }


def apart(scale: str, backbone: str, steps: int) -> dict[str, Any]:
    """The same in a process of its own, so that its peak of memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--alone", "--out", str(result)]
        command += ["--scale", scale, "--backbone", backbone, "--steps", str(steps)]
        # the progress bar is drawn as on a terminal
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"})
        if done.returncode:
            raise SystemExit(f"{scale} {backbone}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A bar per combination, of shares, its milliseconds and memory beside it."""
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.6 * len(runs)), layout="constrained")
    labels = [f"{run['scale']}, {run['backbone']}\n{run['batch_size']} of {run['image_size']}x{run['image_size']}" for run in runs]
    left = [0.0] * len(runs)
    for part, colour in PARTS.items():
        shares = [100 * run["parts"][part]["share"] for run in runs]
        axes.barh(labels, shares, left=left, color=colour, label=part)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    for row, run in enumerate(runs):
        axes.text(101, row, f"{run['step_ms']:,.0f} ms, {run['peak_mib'] / 1024:.1f} GiB", va="center")
    axes.set(xlim=(0, 122), xlabel="share of a training step, %", xticks=range(0, 101, 20))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
    plt.close(figure)


def table(runs: list[dict[str, Any]]) -> Table:
    shown = Table(title="a training step: ms, share, peak MiB")
    shown.add_column("")
    for run in runs:
        shown.add_column(f"{run['scale']} {run['backbone']}\n{run['batch_size']} of {run['image_size']}²", justify="right")
    for part in PARTS:
        cells = [run["parts"][part] for run in runs]
        shown.add_row(part, *(f"{cell['ms']:,.2f}  {cell['share']:6.2%}  {cell['peak_mib']:6,.0f}" for cell in cells))
    shown.add_section()
    shown.add_row("step", *(f"{run['step_ms']:,.1f}  100.00%  {run['peak_mib']:6,.0f}" for run in runs))
    shown.add_row("TDC + logging", *(f"{run['bookkeeping_share']:.2%}" for run in runs))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step by part.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiments/results/benchmarks/step.json", help="the JSON file; a PNG goes beside it"
    )
    parser.add_argument("--scale", choices=("demo", "paper"), action="append", help="may be repeated; default: both")
    parser.add_argument("--backbone", choices=("vit", "unet"), action="append", help="may be repeated; default: both")
    parser.add_argument("--steps", type=int, help=f"steps that count; default {STEPS}")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be positive")
    scales, backbones = options.scale or ["demo", "paper"], options.backbone or ["vit", "unet"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.alone:
        write(measure(scales[0], backbones[0], options.steps), options.out)
        return
    begin, runs = time.perf_counter(), []
    for scale in scales:
        for backbone in backbones:
            runs.append(apart(scale, backbone, options.steps or STEPS[scale]))
            if sys.stderr.isatty():
                print(f"{scale} {backbone}: {runs[-1]['step_ms']:,.1f} ms", file=sys.stderr)
    write({"machine": machine(), "seconds": round(time.perf_counter() - begin, 1), "runs": runs}, options.out)
    draw(runs, options.out.with_suffix(".png"))
    Console(width=None if sys.stdout.isatty() else 150).print(table(runs))


if __name__ == "__main__":
    main()

"""What does `fit` cost beside a bare loop over the same modules? Ratios, and the milliseconds that trainer and callbacks add to a step.

    python experiments/benchmarks/loop.py [--out FILE] [--case tiny] [--blocks N]

fit     the command line's trainer with all its callbacks and loggers, on batches of its loader
loop    encoder, quantizer, decoder, loss, backward pass, clipping and AdamW in a plain loop, on batches of the same loader, in float32
plain   the same loop with LPIPS as it comes: weights and pictures in whatever layout they have

The forms take turns within one process, a block of steps at a time, on copies of the same networks; medians over blocks. Each case, and
each option of it (precision, torch.compile), has a process of its own; with --case the others keep what the file has. The networks of
`paper` train without the discriminator, which all forms would share. `shares` is what the loop's time goes to, by torch's profiler: what
products, convolutions and attention take is torch's own.
"""

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from loader import write_photographs
from machine import machine, write_ratios
from step import CONFIGS, ROOT, Done
from torch import Tensor

from gq_lightning.cli.memory import keep_freed_memory
from gq_lightning.cli.training import CommandLine
from gq_lightning.training.optimization import adamw
from gq_lightning.weights import lpips

TINY = (
    "--model.backbone.init_args.width 32 --model.backbone.init_args.layers 1 --data.init_args.image_size 32 --data.init_args.batch_size 2"
)
BF16, COMPILED = "--trainer.precision bf16-mixed", "--acceleration.compile true"
# configs, options, and steps of a block
CASES: dict[str, tuple[list[str], str, int]] = {
    "tiny": (CONFIGS["demo", "vit"], f"{TINY} --model.loss.lpips_weight 0", 40),
    **{
        f"demo {backbone}{', ' * bool(name)}{name}": (CONFIGS["demo", backbone], options, 10)
        for backbone in ("vit", "unet")
        for name, options in (("", ""), ("bf16", BF16), ("compiled", COMPILED))
    },
    **{
        f"paper {backbone}, {batch} of {size}": (
            CONFIGS["paper", backbone],
            f"--data.init_args.image_size {size} --data.init_args.batch_size {batch} --model.adversary null --data.init_args.workers 0",
            steps,
        )
        for size, batch, steps in ((64, 2, 2), (256, 1, 1))
        for backbone in ("vit", "unet")
    },
}
BLOCKS = 7
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::convolution"),
    "attention": ("aten::_scaled_dot_product",),
    "activations and norms": ("aten::gelu", "aten::silu", "aten::relu", "aten::native_layer_norm", "aten::native_group_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::contiguous", "aten::clone"),
    "optimizer": ("aten::_fused_adamw_",),
}
WANTED = {"overhead of tiny, ms": 2.0} | {
    f"{case}: fit / plain": 0.95 for case in CASES if case in ("demo vit", "demo unet") or case.startswith("paper")
}


class Turns(Callback):
    """Lets the other forms take theirs between blocks of the trainer's steps.

    Args:
        forms: by name, what takes one step.
        steps: of a block.
        blocks: after the first one, which is not counted; then it raises Done.
    """

    def __init__(self, forms: dict[str, Callable[[], None]], steps: int, blocks: int) -> None:
        self.forms, self.steps, self.blocks = forms, steps, blocks
        self.taken: dict[str, list[float]] = {name: [] for name in ("fit", *forms)}
        self._since = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.steps:
            return
        if batch_idx:
            self.taken["fit"].append((time.perf_counter() - self._since) / self.steps)
        for name, step in self.forms.items():
            begin = time.perf_counter()
            for _ in range(self.steps):
                step()
            self.taken[name].append((time.perf_counter() - begin) / self.steps)
        if len(self.taken["fit"]) > self.blocks:
            raise Done
        self._since = time.perf_counter()

    def medians(self) -> dict[str, float]:
        """Seconds of a step, by form."""
        return {name: statistics.median(times[1 : self.blocks + 1]) for name, times in self.taken.items()}


def bare(model: Any, batches: Iterator[Tensor]) -> Callable[[], None]:
    """A step of a copy of the model's networks, without Lightning."""
    tokenizer, loss = copy.deepcopy(model.tokenizer), copy.deepcopy(model.loss)
    parameters = [*tokenizer.parameters(), *loss.parameters()]
    learner = adamw(parameters, model.learning_rate, model.betas, model.weight_decay, 0, "constant", 1)
    optimizer = learner["optimizer"]

    def step() -> None:
        images = next(batches)
        quantized = tokenizer.quantizer(tokenizer.backbone.encode(images).movedim(1, -1))
        reconstructions = tokenizer.backbone.decode(quantized.latents.movedim(-1, 1))
        (loss(reconstructions, images)[0] + quantized.penalty).backward()
        if model.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, model.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain(step: Callable[[], None]) -> Callable[[], None]:
    """The same step with an LPIPS whose layouts nobody has chosen."""
    network = cache(lambda name: lpips._network.__wrapped__(name, torch.device("cpu")).to(memory_format=torch.contiguous_format))

    def distance(module: lpips.LPIPS, images: Tensor, targets: Tensor) -> Tensor:
        return network(module.network)(images, targets).flatten()

    def stepped() -> None:
        with patch.object(lpips.LPIPS, "forward", distance):
            step()

    return stepped


def shares(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Shares of a step's time by kind of operation; `rest` is all others, and Python between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    whole = sum(times.values())
    found = {kind: sum(time for key, time in times.items() if key.startswith(names)) / whole for kind, names in KINDS.items()}
    return {kind: round(share, 3) for kind, share in (found | {"rest": 1 - sum(found.values())}).items()}


def endless(loader: Any) -> Iterator[Tensor]:
    while True:
        yield from loader


def measure(case: str, blocks: int) -> dict[str, Any]:
    """Milliseconds of a step, by form, and shares of the loop's, in this process."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    files, options, steps = CASES[case]
    blocks = min(blocks, 3) if case.startswith("paper") else blocks  # a step takes many seconds
    with tempfile.TemporaryDirectory() as folder:
        arguments = [word for config in files for word in ("--config", str(ROOT / config))] + options.split()
        arguments += ["--runs", folder, "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.limit_val_batches", "0"]
        arguments += ["--trainer.num_sanity_val_steps", "0", "--checkpoint.monitor", "null", "--checkpoint.save_top_k", "0"]
        if case.startswith("paper"):
            write_photographs(Path(folder, "pictures"), 4 * (blocks + 2) * steps)
            arguments += ["--data.init_args.root", f"{folder}/pictures"]
        cli = CommandLine(arguments, run=False)
        cli.datamodule.setup("fit")
        # deep copies are made before the trainer wraps or compiles anything
        forms = {"loop": bare(cli.model, endless(cli.datamodule.train_dataloader()))}
        forms["plain"] = plain(bare(cli.model, endless(cli.datamodule.train_dataloader())))
        cli.trainer.callbacks.append(turns := Turns(forms, steps, blocks))  # type: ignore[attr-defined]
        with contextlib.suppress(Done):
            cli.trainer.fit(cli.model, cli.datamodule)
        milliseconds = {name: round(1000 * seconds, 3) for name, seconds in turns.medians().items()}
        return {"machine": machine(), "milliseconds": milliseconds, "shares": shares(forms["loop"], min(steps, 5))}


def ratios(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    found = {}
    for case, of_case in measured.items():
        taken = of_case["milliseconds"]
        found |= {f"{case}: fit / {form}": taken["fit"] / taken[form] for form in ("loop", "plain")}
        if case == "tiny":
            found["overhead of tiny, ms"] = taken["fit"] - taken["loop"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Times fit beside a bare loop over the same modules.")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/benchmarks/loop.json", help="the JSON file")
    parser.add_argument("--case", choices=CASES, action="append", help="may be repeated; default: all")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks of steps that count")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.blocks < 1:
        parser.error("--blocks must be positive")
    if options.alone:
        print(json.dumps(measure(options.case[0], options.blocks)))
        return
    measured = json.loads(options.out.read_text())["cases"] if options.case and options.out.exists() else {}
    for case in options.case or CASES:
        command = [sys.executable, __file__, "--alone", "--case", case, "--blocks", str(options.blocks)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        measured[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, measured[case]["milliseconds"], file=sys.stderr)
    write_ratios({"cases": measured}, options.out, ratios(measured), WANTED)


if __name__ == "__main__":
    main()

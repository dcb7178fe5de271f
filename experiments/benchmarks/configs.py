"""Does every shipped config train in bf16 and in fp32, how fast, and with how much memory?

    python experiments/benchmarks/configs.py [--out FILE] [--steps 20] [--jobs N] [--only TEXT] [--markdown]

paper/*       both backbones of the paper's size at 256x256, batch 16, with the discriminator from the first step on
quantizer/*   every method on the small ViT, with scale/hour_gpu.yaml
the others    as the headers of the files have it; data that need a download are left out

Each run has a process of its own and the trainer of the command line; no validation and no export follows its steps. With --jobs N, N
processes start at a time, but only one trains, so that no run disturbs another's time. Pictures are cut from photographs that come with
scikit-image, and tokens are drawn at random.

`step_ms` is the median of all steps but the first five, `data_ms` the part of it that waits for data; on a GPU each step is waited for.
`peak_mib` is allocated memory on a GPU, resident memory on a CPU. The losses' difference is that of the last step, relative to fp32's.

Every run is written when it ends, and the next call skips those that succeeded. The exit status is 1 if a run failed; its `error` says why.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from loader import write_photographs
from machine import machine, peak, write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import CUDA, ROOT, Done, Parts

from gq_lightning.cli.prior import PriorCommandLine
from gq_lightning.cli.training import CommandLine
from gq_lightning.data.shards.writing import write_shards
from gq_lightning.tokens.token_set import NO_CLASS, Header, sha256_of, shard_path

PRECISIONS = ("bf16-mixed", "32-true")
WARM_UP = 5
LIMIT = 300  # seconds of a run, after which it has failed
ENDLESS = 1000  # steps of the schedules: a training that reaches its last one would be measured and exported


@dataclass(frozen=True)
class Run:
    """What to train.

    Attributes:
        configs: names in configs/, without suffix.
        root: what `make_data` makes for it; None for data without a root.
        options: further arguments.
    """

    name: str
    configs: tuple[str, ...]
    root: str | None = None
    options: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        return [f"configs/{config}.yaml" for config in self.configs]

    @property
    def is_prior(self) -> bool:
        return "prior" in self.name

    def arguments(self, folder: Path) -> list[str]:
        """Of the command line, for the data in this folder."""
        words = [word for path in self.paths for word in ("--config", str(ROOT / path))] + list(self.options)
        options = ("root", "tokenizer") if self.is_prior else ("root",)
        return words + [word for name in options if self.root for word in (f"--data.init_args.{name}", str(folder / self.root))]


def runs() -> list[Run]:
    """All of them. Those that compile take longest, so they are the last."""
    small = ("base", "backbone/vit_small")
    photographs, hour = (*small, "data/photographs"), ("data/photographs", "scale/hour_gpu")
    quantizers = sorted(path.stem for path in (ROOT / "configs/quantizer").glob("*.yaml"))
    return [
        Run("demo", ("demo",)),
        Run("demo_unet", ("demo", "demo_unet")),
        Run("scale/smoke", (*photographs, "scale/smoke")),
        Run("scale/cpu", (*photographs, "scale/cpu")),
        Run("scale/hour_cpu", (*small, "quantizer/gq_wide", "data/photographs", "scale/hour_cpu")),
        Run("scale/small", ("base", "quantizer/gq_wide", "data/folder", "scale/small"), "pictures/train"),
        Run("data/photographs", photographs),
        Run("data/folder", (*small, "data/folder"), "pictures/train"),
        Run("data/shards", (*small, "data/shards"), "shards"),
        Run("data/imagenet", (*small, "data/imagenet"), "pictures"),
        Run("backbone/unet_small", ("base", "backbone/unet_small", "quantizer/gq", *hour)),
        *(Run(f"quantizer/{name}", (*small, f"quantizer/{name}", *hour)) for name in quantizers),
        Run("backbone/diffusers", ("base", "backbone/diffusers", "quantizer/gq", "data/imagenet"), "pictures"),
        *(
            Run(
                f"paper/{backbone}/{name}",
                ("base", f"backbone/{backbone}", f"quantizer/{name}", "scale/paper"),
                "pictures",
                ("--model.adversary.start", "0"),
            )
            for backbone in ("unet", "vit")
            for name in ("gq", "gq_wide", "vq", "fsq", "bsq")
        ),
        Run("demo_prior", ("demo_prior",), "tokens_64"),
        Run("prior/small", ("prior/small",), "tokens_64"),
        Run("prior/llama_b", ("prior/llama_b",), "tokens_256"),
        Run("prior/llama_l", ("prior/llama_l",), "tokens_256"),
    ]


def make_data(folder: Path, chosen: list[Run], steps: int) -> None:
    """What the chosen runs read, enough for all their steps without a second epoch."""
    roots = {run.root for run in chosen}
    if roots & {"pictures", "pictures/train", "shards"}:
        write_photographs(folder / "pictures", 18 * (steps + 2))  # 16 in a batch, and the held-out ones
        write_shards(folder / "pictures/train", folder / "shards", broken="unchecked", workers=0)
    for size in (64, 256):
        write_tokens(folder / f"tokens_{size}", size, 32 * (steps + 2))


def write_tokens(folder: Path, size: int, rows: int) -> None:
    """A token set of 16 bits for 8x8 pixels, and the file by which its tokenizer is known."""
    header = Header((size // 8, size // 8, 1), 65536, 8, "0" * 64, [], ["centre"], "drawn at random", "", [], {})
    records = np.full(rows, NO_CLASS, header.record)
    # small ones are more frequent, which a prior can learn
    records["tokens"] = header.codebook_size * np.random.default_rng(0).random(records["tokens"].shape) ** 2
    for split in ("train", "val"):
        array, names = (shard_path(folder / split, 0, suffix) for suffix in ("npy", "json"))
        array.parent.mkdir(parents=True)
        np.save(array, records)
        names.write_text("{}")
        replace(header, split=split, shards=[(rows, sha256_of(array), sha256_of(names))]).write(folder / split)
    (folder / "config.json").write_text(json.dumps({"fingerprint": header.tokenizer}))


class Losses(Callback):
    """The loss of every step, left on its device."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].detach())


def measure(run: Run, precision: str, steps: int, folder: Path, wait: Callable[[], object]) -> dict[str, Any]:
    """One run, in this process, which trains when `wait` returns."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        arguments = [*run.arguments(folder), "--config", str(ROOT / f"configs/machine/{'gpu' if CUDA else 'cpu'}.yaml")]
        arguments += ["--runs", place, "--trainer.precision", precision, "--trainer.max_steps", str(ENDLESS)]
        arguments += ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
        cli = (PriorCommandLine if run.is_prior else CommandLine)(arguments, run=False)
        cli.trainer.profiler, losses = (parts := Parts(steps, 0)), Losses()  # type: ignore[attr-defined]
        cli.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
        if CUDA:  # loads the libraries
            torch.nn.Conv2d(3, 3, 3, device="cuda")(torch.zeros(1, 3, 8, 8, device="cuda"))
        wait()
        peak()  # from here on
        with suppress(Done):
            cli.trainer.fit(cli.model, cli.datamodule)
        most, values = peak(), [float(loss) for loss in losses.values]
    for number, value in enumerate(values, start=1):
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {number}")
    data, module = cli.datamodule, cli.model.prior if run.is_prior else cli.model.tokenizer
    milliseconds = statistics.median(sum(step.values()) for step in parts.steps[WARM_UP:]) * 1000
    return {
        "batch_size": data.batch_size,
        "image_size": data.header.grid[0] * data.header.downsampling if run.is_prior else data.image_size,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "step_ms": round(milliseconds, 2),
        "data_ms": round(statistics.median(step.get("data", 0.0) for step in parts.steps[WARM_UP:]) * 1000, 2),
        "images_per_second": round(1000 * data.batch_size / milliseconds, 1),
        "peak_mib": round(most, 1),
        "first_loss": float(f"{values[0]:.6g}"),
        "last_loss": float(f"{values[-1]:.6g}"),
    }


def apart(run: Run, precision: str, steps: int, folder: Path, turn: threading.Lock) -> dict[str, Any]:
    """The same in a process of its own, which trains when it is its turn, or why it failed."""
    result = folder / f"{run.name}-{precision}.json".replace("/", "-")
    command = [sys.executable, __file__, "--alone", run.name, precision, str(folder), "--steps", str(steps), "--out", str(result)]
    begin, late = time.perf_counter(), ""
    with (
        open(result.with_suffix(".log"), "w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        next((line for line in process.stdout if line == "ready\n"), None)
        with turn:
            begin = time.perf_counter()
            try:
                process.communicate("go\n", LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                late = f"not done after {LIMIT} seconds"
        log.seek(0)
        error = late or (log.read().strip().splitlines() or [f"exit status {process.wait()}"])[-1]
    found = {"error": error} if late or process.returncode else json.loads(result.read_text())
    about = {"name": run.name, "configs": run.paths, "options": list(run.options), "precision": precision}
    return {**about, "seconds": round(time.perf_counter() - begin, 1), **found}


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """A head, and a row of cells for each name."""
    columns = (
        ("ms per step", "step_ms", 1),
        ("of it data", "data_ms", 1),
        ("images/s", "images_per_second", 1),
        ("peak GiB", "peak_mib", 1024),
    )
    result = [["", "batch", "parameters", *(f"{head}, bf16 / fp32" for head, _, _ in columns), "loss differs by"]]
    for name in dict.fromkeys(run["name"] for run in found):
        both = [next((run for run in found if (run["name"], run["precision"]) == (name, kind)), {}) for kind in PRECISIONS]
        good = [run for run in both if "step_ms" in run]
        cells = [f"{good[0]['batch_size']} of {good[0]['image_size']}²", f"{good[0]['parameters'] / 1e6:,.1f} M"] if good else ["", ""]
        for _, key, unit in columns:
            shown = [_short(run[key] / unit) if key in run else "failed" if run else "missing" for run in both]
            cells.append(" / ".join(shown))
        half, full = (run.get("last_loss", math.nan) for run in both)
        result.append([name, *cells, f"{abs(half / full - 1):.3%}" if len(good) == 2 else ""])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains every shipped config for some steps, in bf16 and in fp32.")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/benchmarks/configs.json", help="the JSON file")
    parser.add_argument("--steps", type=int, default=20, help=f"steps of a run; the first {WARM_UP} are not timed")
    parser.add_argument("--jobs", type=int, default=1, help="processes that start at a time; one alone trains")
    parser.add_argument("--only", default="", help="run those with this text in their name")
    parser.add_argument("--markdown", action="store_true", help="print the table of the JSON file and run nothing")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.steps >= ENDLESS or options.jobs < 1:
        parser.error(f"--steps must be {WARM_UP + 1} to {ENDLESS - 1}, and --jobs positive")
    if options.alone:
        name, precision, folder = options.alone
        run = next(run for run in runs() if run.name == name)
        write(measure(run, precision, options.steps, Path(folder), lambda: (print("ready", flush=True), input())), options.out)
        return
    about: dict[str, Any] = {"machine": machine(), "steps": options.steps}
    before = json.loads(options.out.read_text()) if options.out.exists() else {**about, "runs": []}
    if options.markdown:
        head, *body = rows(before["runs"])
        print("\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body)))
        return
    if {key: before[key] for key in about} != about:
        parser.error(f"{options.out} is of another machine, other versions or other --steps: choose another --out")
    chosen = [run for run in runs() if options.only in run.name]
    found = {(run["name"], run["precision"]): run for run in before["runs"]}
    done = {key for key, run in found.items() if "error" not in run}
    order = [(run.name, precision) for run in runs() for precision in PRECISIONS]
    calls = [(run, precision) for run in chosen for precision in PRECISIONS if (run.name, precision) not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console, turn = Console(width=None if sys.stdout.isatty() else 180), threading.Lock()
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        make_data(Path(folder), [run for run, _ in calls], options.steps)
        futures = [pool.submit(apart, run, precision, options.steps, Path(folder), turn) for run, precision in calls]
        for future in progress.track(as_completed(futures), total=len(futures), description="trainings"):
            new = future.result()
            found[new["name"], new["precision"]] = new
            write({**about, "runs": [found[key] for key in order if key in found]}, options.out)
            told = new.get("error") or f"{new['step_ms']:,.1f} ms, {new['peak_mib']:,.0f} MiB; {new['seconds']} s"
            progress.console.print(f"{new['name']} {new['precision']}: {told}", markup=False, highlight=False)
    shown = [found[key] for key in order if key in found and options.only in key[0]]
    head, *body = rows(shown)
    table = Table(*head, title="training steps of the shipped configs")
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    raise SystemExit(any("error" in run for run in shown))


if __name__ == "__main__":
    main()

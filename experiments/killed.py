"""Shared parts of the kill tests: a small training by its command, its processes, and the comparison of two finished runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from arms import ROOT

CONFIGS = ROOT / "configs"


def write_pictures(folder: Path) -> Path:
    """22 of noise to train on: five batches of four, and two pictures that an epoch leaves out; five to validate."""
    for split, count in (("train", 22), ("val", 5)):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng(index + 100 * (split == "val")).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 64)).save(folder / split / f"{index}.png")
    return folder


def arguments(pictures: Path, runs: Path, name: str, ranks: int = 1, nodes: int = 1) -> list[str]:
    """`-m gq_lightning fit …` with all that has a state, which is resumed if it can be; `ranks` in all share batches of four."""
    files = ("base.yaml", "backbone/vit_small.yaml", "data/folder.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    return [
        *("-m", "gq_lightning", "fit"),
        *(text for file in files for text in ("--config", str(CONFIGS / file))),
        *(
            f"--data.init_args.{key}"
            for key in (f"root={pictures}/train", f"validation_root={pictures}/val", f"batch_size={4 // ranks}", "workers=2")
        ),
        # an odd number of batches, which ranks have not alike
        *(["--data.init_args.evaluation_batch_size=1"] if ranks > 1 else []),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1", "--model.schedule=cosine"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--export.rfid=false", "--trainer.enable_progress_bar=false", "--trainer.max_steps=24", "--trainer.val_check_interval=7"),
        *("--last.every_n_train_steps=3", "--ema_decay=0.9", f"--runs={runs}", f"--name={name}", "--threads=1", "--ckpt_path=last"),
        *([] if ranks == 1 else [f"--trainer.devices={ranks // nodes}", f"--trainer.num_nodes={nodes}", "--trainer.strategy=ddp"]),
    ]


class Life:
    """One process of a training and all that it starts, from its begin to its end; what it says goes to a file.

    Args:
        call: arguments of `program`, by default of the interpreter.
        log: the file, written on.
        settings: of the process, such as its environment.
    """

    def __init__(self, call: Sequence[str], log: Path, program: Sequence[str] = (sys.executable,), **settings: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self._before = log, log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            # a session of its own, and so a process group that is the loader's workers' too
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen([*program, *call], cwd=ROOT, start_new_session=True, **streams, **settings)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """By SIGKILL, at once: the process group, and what left it, as torchrun's workers do."""
        family = descendants(self.process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def words(self) -> str:
        """The output of this process so far."""
        with open(self.log, "rb") as file:
            file.seek(self._before)
            return file.read().decode(errors="replace")

    def survivors(self) -> list[int]:
        """Processes of the group that live; after `kill` none, as soon as the kernel is done with them."""
        for _ in range(100):
            found = [pid for pid, (state, _, group) in _processes().items() if group == self.process.pid and state not in "ZX"]
            if not found:
                break
            time.sleep(0.05)
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each local rank. Rank 0 of Lightning's launcher is the first one, which began the others; torchrun begins all."""
        found: dict[int, int] = {}
        for pid in sorted(descendants(self.process.pid)):
            with suppress(OSError):
                entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
                rank = dict(entry.partition("=")[::2] for entry in entries).get("LOCAL_RANK")
                if rank is not None:
                    found.setdefault(int(rank), pid)  # a loader's workers say the same, and are younger
        return {0: self.process.pid} | found


def _processes() -> dict[int, tuple[str, int, int]]:
    """State, parent and process group of each process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            found[int(path.parent.name)] = (state, int(parent), int(group))
    return found


def descendants(pid: int) -> list[int]:
    """The processes that this one has begun, and they, and so on."""
    processes, found = _processes(), [pid]
    for each in found:
        found += [child for child, (_, parent, _) in processes.items() if parent == each]
    return found[1:]


def step_of(path: Path) -> int:
    """Of a checkpoint; 0 where there is none."""
    return torch.load(path, weights_only=True, mmap=True)["global_step"] if path.exists() else 0


def read(path: Path) -> dict[str, Any]:
    """A checkpoint without what Lightning counts but does not use."""
    checkpoint = torch.load(path, weights_only=True)
    # how many validation batches there have been in the epoch
    checkpoint["loops"] = {"fit_loop": {key: value for key, value in checkpoint["loops"]["fit_loop"].items() if "val_loop" not in key}}
    for state in checkpoint["callbacks"].values():
        state.pop("current_score", None)  # of the last validation; the best is what counts, and Lightning does not restore this one
    return checkpoint


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """The first place where two nested states differ by any bit; None if they are equal."""
    if type(first) is not type(second):
        return f"{where}: {type(first).__name__}, {type(second).__name__}"
    if isinstance(first, torch.Tensor):
        return None if torch.equal(first, second) else where
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            return f"{where}: {sorted(map(str, first.keys() ^ second.keys()))} in one of them alone"
        pairs = [(key, first[key], second[key]) for key in first]
    elif isinstance(first, Sequence) and not isinstance(first, str):
        if len(first) != len(second):
            return f"{where}: {len(first)} and {len(second)} items"
        pairs = [(index, *pair) for index, pair in enumerate(zip(first, second, strict=True))]
    else:
        return None if first == second else f"{where}: {first} and {second}"
    return next((found for key, one, other in pairs if (found := difference(one, other, f"{where}/{key}"))), None)


def difference_of_runs(whole: Path, killed: Path) -> str | None:
    """Where the end of a killed run differs from that of the undisturbed one: the last checkpoint, the metrics, any point of a curve.

    A point that was logged with a checkpoint, and not yet written when the process was killed, may be missing.
    """
    checkpoints, metrics, curves = zip(*(_ends(folder) for folder in (whole, killed)), strict=True)
    if found := difference(*checkpoints, where="last.ckpt") or difference(*metrics, where="metrics.json"):
        return found
    strange = [f"{name} at step {step}: {value}" for name in curves[1] for step, value in curves[1][name] - curves[0].get(name, set())]
    return next(iter([*strange, *(f"{name}: no curve" for name in curves[0].keys() - curves[1].keys())]), None)


def _ends(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, set[tuple[int, float]]]]:
    """Metrics without the entries that depend on the run's name, the machine or the time."""
    checkpoint = read(folder / "checkpoints/last.ckpt")
    del checkpoint["callbacks"]
    metrics = json.loads((folder / "metrics.json").read_text())
    board = EventAccumulator(str(folder)).Reload()
    curves = {
        name: {(event.step, event.value) for event in board.Scalars(name)}
        for name in board.Tags()["scalars"]
        if name not in ("images_per_second", "memory_gib", "epoch") and "seconds" not in name
    }
    return checkpoint, {key: value for key, value in metrics.items() if "seconds" not in key}, curves

"""Tests that a repeatedly killed run equals the undisturbed one. Kills are SIGKILL to the whole process group.

    python experiments/soak.py [--kills 30] [--ranks 1] [--seed 0] [--out experiments/results/soak.json]

A small training, with TDC, averaged weights, a learning rate that falls, checkpoints every 10 steps and two worker processes, runs once
undisturbed. The same command is then started, killed and started again. Where a kill falls is drawn, and takes turns between

anywhere  a moment of the process's life, its start above all, and at the latest when it has written up to three checkpoints
training  some time after one of the next three checkpoints
writing   while a checkpoint is being written: as soon as its temporary file is seen, and up to as long as a write takes

Only what is found afterwards counts as a kill within a write: a temporary file that was begun in this life and never got its name.
The last life is left alone. Its end is compared with the undisturbed run's, to the bit: weights, averages, multipliers, optimizer,
scheduler, progress, metrics, and every point of every curve. Writes soak.json; the exit status is 0 if all that is as it should be.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arms import ROOT
from benchmarks.machine import machine, write
from killed import Life, arguments, difference_of_runs, step_of, write_pictures

EVERY = 10
STEPS = 40  # for each kill, so that none comes too late
KINDS = ("writing", "training", "anywhere")
# a model whose checkpoint takes a while to write
MORE = ("--model.backbone.init_args.width=128", "--model.backbone.init_args.layers=2", "--trainer.val_check_interval=25")
LONGEST = 900.0  # seconds of a life
WRITE = 0.02  # seconds that a write takes


class Files:
    """What the checkpoints' folder shows to one who watches it from outside."""

    def __init__(self, folder: Path) -> None:
        self.last, self._folder = folder / "last.ckpt", folder
        self._before = self._looks()

    def _looks(self) -> dict[Path, tuple[int, int]]:
        looks = {}
        for path in self._folder.glob(".*.ckpt.*.tmp"):
            try:
                looks[path] = ((seen := path.stat()).st_mtime_ns, seen.st_size)
            except FileNotFoundError:
                continue
        return looks

    def being_written(self) -> int | None:
        """Bytes of a temporary file that was begun since this object was made, if there is one."""
        return next((look[1] for path, look in self._looks().items() if look != self._before.get(path)), None)

    def written(self) -> int:
        """When the last checkpoint got its name, in nanoseconds."""
        try:
            return self.last.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def kill_once(life: Life, files: Files, kind: str, chance: random.Random, startup: float) -> bool:
    """Kills at a moment of that kind; whether the life has not ended before."""
    writing, busy, last, seen, count = kind == "writing", False, files.written(), 0, chance.randint(1, 3)
    latest = time.monotonic() + (chance.uniform(0, 1.3 * startup) if kind == "anywhere" else LONGEST)
    while seen < count and time.monotonic() < latest and not life.ended:
        if writing:
            before, busy = busy, files.being_written() is not None
            seen += busy and not before
        else:
            before, last = last, files.written()
            seen += last != before
        time.sleep(0.0005 if writing else 0.005)
    if kind != "anywhere":
        time.sleep(chance.uniform(0, WRITE if writing else 0.5))
    killed = not life.ended
    life.kill()
    return killed


def trial(folder: Path, kills: int, ranks: int, seed: int) -> dict[str, Any]:
    """Runs both and says what happened. Raises RuntimeError where a life fails by itself."""
    chance, pictures, steps = random.Random(seed), write_pictures(folder / "pictures"), STEPS * max(kills, 1)
    more = [*MORE, f"--trainer.max_steps={steps}", f"--last.every_n_train_steps={EVERY}"]
    whole, killed = ([*arguments(pictures, folder, name, ranks), *more] for name in ("whole", "killed"))
    begin = time.monotonic()
    with Life(whole, folder / "whole.log") as life:
        files = Files(folder / "whole/checkpoints")
        while not files.written() and not life.ended:
            time.sleep(0.01)
        startup = time.monotonic() - begin
        finish(life)
    print(f"undisturbed: {steps} steps in {time.monotonic() - begin:.0f} s, {startup:.1f} s to the first checkpoint", flush=True)
    found: list[dict[str, Any]] = []
    while len(found) < kills:
        files, kind = Files(folder / "killed/checkpoints"), KINDS[len(found) % len(KINDS)]
        start = time.monotonic()
        with Life(killed, folder / "killed.log") as life:
            if not kill_once(life, files, kind, chance, startup):
                finish(life)
                break
            seconds = time.monotonic() - start
            if left := life.survivors():
                raise RuntimeError(f"processes {left} outlived the kill of their group")
        written, step = files.being_written(), step_of(files.last)
        found.append({"moment": kind, "seconds": round(seconds, 2), "in_a_write": written is not None, "goes_on_from_step": step})
        where = "" if written is None else f", in a checkpoint's write, at {written / 1e6:.2f} of {size(files.last):.2f} MB"
        print(f"kill {len(found):2d} of {kills} ({kind}) after {seconds:4.1f} s{where}; goes on from step {step}", flush=True)
    else:
        with Life(killed, folder / "killed.log") as life:
            finish(life)
    return {"steps": steps, "kills": found, "difference": difference_of_runs(folder / "whole", folder / "killed")}


def finish(life: Life) -> None:
    if status := life.wait(LONGEST):
        raise RuntimeError(f"exit status {status}: {life.words[-2000:]}")


def size(path: Path) -> float:
    return path.stat().st_size / 1e6 if path.exists() else 0.0


def verdict(result: dict[str, Any], kills: int) -> tuple[bool, str]:
    """Whether the result is correct, and a sentence about it."""
    count, writes = len(result["kills"]), sum(each["in_a_write"] for each in result["kills"])
    passed = result["difference"] is None and count == kills and writes > 0
    end = "its end is the undisturbed run's to the bit" if result["difference"] is None else f"its end differs: {result['difference']}"
    return passed, f"{count} of {kills} kills, {writes} of them within a checkpoint's write: {end}."


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kills a training again and again, and compares its end with the undisturbed one's.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4), help="processes of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/soak.json")
    options = parser.parse_args(words)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = trial(Path(folder), options.kills, options.ranks, options.seed)
    passed, sentence = verdict(result, options.kills)
    command = f"python experiments/soak.py --kills {options.kills} --ranks {options.ranks} --seed {options.seed}"
    facts = {"command": command, "machine": machine() | {"threads": 1}, "seconds": round(time.monotonic() - begin, 1)}
    within = sum(each["in_a_write"] for each in result["kills"])
    write({**facts, "verdict": sentence, "passed": passed, "ranks": options.ranks, "kills_within_a_write": within, **result}, options.out)
    print(sentence)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

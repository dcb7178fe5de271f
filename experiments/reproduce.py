"""Runs an experiment that is written down as data, arm by arm, through the command line, and tabulates what it measured.

    python experiments/reproduce.py experiments/methods.yaml [--dry-run] [--jobs 2]

spec (YAML) -> arms: one `python -m gq_lightning fit …` each -> experiments/results/NAME/ARM.json -> experiments/results/NAME.md

An arm whose JSON is there and came from the same command is skipped, so that an interrupted experiment goes on where it stopped. An arm
that fails is reported at the end, the others go on, and the exit status is 1.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
RUNS = "runs/experiments"


@dataclass(frozen=True)
class Arm:
    """One combination of the axes' values.

    Attributes:
        name: of its files.
        values: by axis.
        command: what anyone could type, from the project's folder.
    """

    name: str
    values: dict[str, Any]
    command: list[str]


def arms(spec: dict[str, Any], experiment: str) -> list[Arm]:
    """The arms of a spec, in the order of its axes: base configs, then the axes' arguments, then the overrides, which win."""
    found = []
    for combination in itertools.product(*spec["axes"].values()):
        values = dict(zip(spec["axes"], combination, strict=True))
        name = "-".join(str(value) for value in combination)
        command = ["python", "-m", "gq_lightning", "fit"]
        for config in spec["configs"]:
            command += ["--config", config]
        for axis, value in values.items():
            command += shlex.split(spec["arguments"][axis].format(value))
        for key, value in spec.get("overrides", {}).items():
            command += [f"--{key}", json.dumps(value) if isinstance(value, (dict, list)) or value is None else str(value).lower()]
        found.append(Arm(name, values, [*command, "--runs", f"{RUNS}/{experiment}", "--name", name, "--overwrite", "true"]))
    return found


def run(arm: Arm, experiment: str, results: Path) -> str | None:
    """Trains and measures one arm; returns what went wrong, or None. Its log is in its run's folder."""
    folder = ROOT / RUNS / experiment / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run([sys.executable, *arm.command[1:]], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
        return f"{arm.name}: exit status {done.returncode}: {' '.join(last)} (see {folder / 'log.txt'})"
    metrics = json.loads((folder / "metrics.json").read_text())
    content = {"arm": arm.values, "command": shlex.join(arm.command), "commit": commit(), "metrics": metrics}
    temporary = results / f".{arm.name}.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, results / f"{arm.name}.json")
    return None


def commit() -> str | None:
    """The commit that was measured, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def finished(arm: Arm, results: Path) -> dict[str, Any] | None:
    path = results / f"{arm.name}.json"
    content = json.loads(path.read_text()) if path.is_file() else None
    return content if content and content["command"] == shlex.join(arm.command) else None


def table(spec: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """Markdown: a row per arm, the columns that the spec names; a metric that an arm has not is left empty."""
    rows, columns = spec["table"]["rows"], spec["table"]["columns"]
    lines = [f"| {rows} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for content in measured:
        metrics = content["metrics"]
        cells = [f"{metrics[column]:.4g}" if column in metrics else "" for column in columns]
        lines.append(f"| {content['arm'][rows]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs an experiment written as YAML; finished arms are skipped.")
    parser.add_argument("spec", type=Path, help="YAML file with configs, axes, arguments, overrides and table")
    parser.add_argument("--dry-run", action="store_true", help="print the command of every arm and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time")
    options = parser.parse_args()
    spec, experiment = yaml.safe_load(options.spec.read_text()), options.spec.stem
    planned, results = arms(spec, experiment), ROOT / "experiments/results" / experiment
    if options.dry_run:
        print("\n".join(shlex.join(arm.command) for arm in planned))
        return 0
    results.mkdir(parents=True, exist_ok=True)
    waiting = [arm for arm in planned if finished(arm, results) is None]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    failures: list[str] = []
    with Progress(*columns) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task(experiment, total=len(planned), completed=len(planned) - len(waiting))
        for arm, failure in zip(waiting, pool.map(lambda arm: run(arm, experiment, results), waiting), strict=True):
            failures += [failure] if failure else []
            progress.update(task, advance=1, description=f"{experiment}: {arm.name}")
    measured = [content for arm in planned if (content := finished(arm, results)) is not None]
    (results.parent / f"{experiment}.md").write_text(f"<!-- python experiments/reproduce.py {options.spec} -->\n\n{table(spec, measured)}")
    print((results.parent / f"{experiment}.md").read_text())
    for failure in failures:
        Console(stderr=True).print(f"failed: {failure}", style="red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the arms of an experiment spec through the command line, and shows the results.

    python experiments/reproduce.py experiments/fig1.yaml --profile cpu --data FOLDER [--jobs 2] [--only vit-gq] [--sweep] [--dry-run]

spec (YAML) -> arms: one `python -m gq_lightning fit …` each -> experiments/results/NAME/[PROFILE/[sweep/]]ARM.json -> tables and figures

An arm with a JSON file of the same command is skipped, and an interrupted arm resumes from its last checkpoint, so a second call loses
nothing. If an arm fails, the others continue; the failure is reported at the end, and the exit status is 1. `--show` draws the results so
far, while other arms still run or after an interruption; it needs the same --data as the run.
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import tables
from arms import DATA, ROOT, Arm, Spec, SpecError, arms, check, choose, read
from estimates import seconds, spoken, summarized
from pictures import download
from running import ArmFailure, Runner, finished

INTERRUPTED = 130


class Progress:
    """What is running, how much is done and how long the rest takes."""

    def __init__(self, title: str, planned: list[Arm], results: Path, cost: Spec, jobs: int) -> None:
        self.title, self.planned, self.results, self.cost, self.jobs = title, planned, results, cost, jobs
        self.running: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._flops = summarized()
        self.update()

    def update(self) -> None:
        found = [(arm, finished(arm, self.results)) for arm in self.planned]
        self.measured = [content for _, content in found if content is not None]
        self.waiting = [arm for arm, content in found if content is None and arm.name not in self.failures]

    def estimate(self, arm: Arm) -> float | None:
        return seconds(arm, self.cost, self.measured, self._flops)

    def left(self) -> float | None:
        """Seconds until all is done."""
        now, total, longest = time.monotonic(), 0.0, 0.0
        for arm in self.waiting:
            if (estimate := self.estimate(arm)) is None:
                return None
            rest = max(0.0, estimate - (now - self.running.get(arm.name, now)))
            total, longest = total + rest, max(longest, rest)
        return max(total / self.jobs, longest)

    def line(self, name: str, begin: float) -> str:
        """What a log has of an arm that has ended; `begin` is when the first one began."""
        state = "failed" if name in self.failures else "done"
        failed = f", {len(self.failures)} failed" if self.failures else ""
        counted = f"{len(self.measured)} of {len(self.planned)} arms{failed}"
        return f"{name}: {state}; {counted}, {spoken(time.monotonic() - begin)} so far, about {spoken(self.left())} left"

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, since in list(self.running.items()):
            arm = next(arm for arm in self.planned if arm.name == name)
            table.add_row(f"  {name}", spoken(time.monotonic() - since), f"of about {spoken(self.estimate(arm))}")
        done, failed = len(self.measured), f", {len(self.failures)} failed" if self.failures else ""
        bar = Table.grid(padding=(0, 1))
        text = f"{done} of {len(self.planned)} arms{failed}, about {spoken(self.left())} left"
        bar.add_row(self.title, ProgressBar(len(self.planned), done, width=30), text)
        return Group(table, bar)


def dry_run(progress: Progress, data: str | None) -> None:
    """Prints the command of each arm and its time."""
    total = 0.0
    devices = progress.cost.get("devices", 1) if "sustained_flops" in progress.cost else None
    for arm in progress.planned:
        command = arm.with_data(data or DATA)
        done, estimate = arm not in progress.waiting, progress.estimate(arm)
        total += 0.0 if done or estimate is None else estimate
        print(f"{command}  # {arm.name}: {'finished' if done else f'about {spoken(estimate)}'}")
    cost = f", {total * devices / 3600:,.0f} GPU hours" if devices else ""
    print(f"# {len(progress.waiting)} of {len(progress.planned)} arms to run: about {spoken(total / progress.jobs)}{cost}")


def run(progress: Progress, runner: Runner, console: Console) -> None:
    """Runs the pending arms, `jobs` at a time.

    Raises:
        KeyboardInterrupt: after the processes have been ended.
    """

    def one(arm: Arm) -> None:
        progress.running[arm.name] = time.monotonic()
        try:
            runner.run(arm)
        finally:
            del progress.running[arm.name]

    begin = time.monotonic()
    with Live(progress, console=console, refresh_per_second=2, transient=True), ThreadPoolExecutor(progress.jobs) as pool:
        waiting = {pool.submit(one, arm): arm for arm in progress.waiting}
        try:
            for future in as_completed(waiting):
                name, error = waiting[future].name, future.exception()
                if error is not None:
                    progress.failures[name] = str(error) if isinstance(error, (ArmFailure, OSError)) else repr(error)
                progress.update()
                console.print(progress.line(name, begin), style="red" if error else None, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise


def show(spec: Spec, planned: list[Arm], results: Path, call: str) -> None:
    """Writes and prints the tables and figures of the finished arms."""
    if not (measured := [content for arm in planned if (content := finished(arm, results)) is not None]):
        return
    if "table" in spec:
        path = results.parent / f"{results.name}.md"
        path.write_text(f"<!-- {call} -->\n\n{tables.markdown(spec['table'], measured)}")
        print(path.read_text())
    if "best" in spec:
        print(tables.rules(spec["best"], measured, planned))
    if "plot" in spec and "best" not in spec:  # a search is no figure: its points differ in more than their seeds
        from plot import draw  # matplotlib is wanted by nothing else

        for path in draw(spec["plot"], planned, measured, results, call):
            print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs an experiment written as YAML; finished arms are skipped.")
    parser.add_argument("spec", type=Path, help="YAML file, see experiments/arms.py")
    parser.add_argument("--profile", help="one of the spec's profiles")
    parser.add_argument("--sweep", action="store_true", help="run the profile's sweep instead")
    parser.add_argument("--data", help="folder of the pictures, where the profile wants one")
    parser.add_argument("--jobs", type=int, help="arms at a time; by default one a core where the profile says `jobs: cores`, else 1")
    parser.add_argument("--accelerator", help="train there, such as on `gpu`, whatever the profile says; the arms stay the same")
    parser.add_argument("--only", default="", help="run only the arms whose names contain this")
    parser.add_argument("--dry-run", action="store_true", help="print the command of every arm and what it takes, and run nothing")
    parser.add_argument("--show", action="store_true", help="draw and print what has been measured so far, and run nothing")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="folder of all results")
    parser.add_argument("--runs", default="runs/experiments", help="folder of all runs")
    options = parser.parse_args(arguments)
    try:
        return experiment(options)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def experiment(options: argparse.Namespace) -> int:
    spec = choose(read(options.spec), options.profile, options.sweep)
    check(spec)
    own = spec.get("without_data") if options.data is None else None
    profile = "-".join(filter(None, [options.profile, own and own["name"]]))
    parts = [options.spec.stem, *([profile] if profile else []), *(["sweep"] if options.sweep else [])]
    results = ROOT.joinpath(options.results, *parts)
    every = arms(spec, "/".join([options.runs, *parts]))
    if not (planned := [arm for arm in every if options.only in arm.name]):
        raise SpecError(f"--only {options.only}: no arm has it in its name; {every[0].name} is one of {len(every)}")
    jobs = options.jobs if options.jobs is not None else cores() if spec.get("jobs") == "cores" else 1
    if jobs < 1:
        raise SpecError(f"--jobs {jobs}: give a positive number")
    call = " ".join(["python experiments/reproduce.py", str(options.spec), *([f"--profile {options.profile}"] if options.profile else [])])
    call += f" --data {DATA}" if options.data else ""
    if options.show:
        show(spec, every, results, call)
        return 0
    data = str(Path(options.data).expanduser().resolve()) if options.data else None
    progress = Progress(" ".join(parts), planned, results, spec.get("cost", {}), jobs)
    if options.dry_run:
        dry_run(progress, data)
        return 0
    console = Console(stderr=True)
    announce(spec, progress, console)
    if any(arm.with_data("/") != arm.line for arm in planned):
        data = folder_of_pictures(spec, data)
    results.mkdir(parents=True, exist_ok=True)
    # so that a kill is a Ctrl-C, and a Ctrl-C works in the background too, where shells have it ignored
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        run(progress, Runner(results, data, accelerator=options.accelerator), console)
    except KeyboardInterrupt:
        console.print("stopped; the same call goes on where this one was, and --show draws what there is", soft_wrap=True)
        return INTERRUPTED
    show(spec, every, results, call)
    for name, failure in progress.failures.items():
        console.print(f"failed: {name}: {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
    if "next" in spec and not progress.failures:
        console.print(f"\n{spec['next']}", highlight=False, soft_wrap=True)
    return 1 if progress.failures else 0


def announce(spec: Spec, progress: Progress, console: Console) -> None:
    """What is about to happen, how long it takes and on which pictures."""
    if "about" not in spec:
        return
    count, waiting = len(progress.planned), len(progress.waiting)
    takes = f"about {spoken(progress.left())}, {progress.jobs} at a time" if waiting else "nothing left to run"
    lines = [f"{progress.title}: {spec['about']}", f"{count} arms, {count - waiting} of them finished; {takes}"]
    lines += [f"pictures: {spec['pictures']}"] if "pictures" in spec else []
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def folder_of_pictures(spec: Spec, data: str | None) -> str:
    """The one that was given, or that of the spec's own download.

    Raises:
        SpecError: there is none.
    """
    if data is None and "without_data" in spec:
        return str(download(spec["without_data"]))
    if data is None:
        raise SpecError(f"--data: this needs a folder of pictures, its {DATA}" + (f": {spec['pictures']}" if "pictures" in spec else ""))
    if not Path(data).is_dir():
        raise SpecError(f"--data {data}: no such folder")
    return data


if __name__ == "__main__":
    sys.exit(main())

"""Runs the command of one arm, resuming an interrupted run of the same command, and records its measurements."""

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from arms import DATA, ROOT, Arm, with_data, without_data
from gq_lightning.files import write_whole

SECONDS_TO_END = 5.0


class ArmFailure(Exception):
    """A failure of an arm; the message is one line."""


class Runner:
    """Runs arms in separate processes, from several threads.

    Args:
        results: folder of the JSON files.
        data: folder of the pictures, or None where no arm asks for DATA.
        python: the interpreter, and anything that stands before an arm's arguments.
        accelerator: trains there, whatever the arm's configs say. Its command, by which it is known, stays; its JSON names the device.
    """

    def __init__(
        self, results: Path, data: str | None = None, python: tuple[str, ...] = (sys.executable,), accelerator: str | None = None
    ) -> None:
        self.results, self.data, self.python, self.accelerator = results, data, python, accelerator
        self._stopped = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()

    def run(self, arm: Arm) -> None:
        """Trains and measures one arm and writes its JSON. Its log is in its run's folder.

        Raises:
            ArmFailure: the arm failed or was stopped.
        """
        command, *then = [[with_data(word, self.data) if self.data else word for word in command] for command in (arm.command, *arm.then)]
        if self.accelerator and "fit" in command:
            command += ["--trainer.accelerator", self.accelerator]
        folder, begin = ROOT / arm.folder, time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        with self._claimed(folder) as lock:
            if finished(arm, self.results) is not None:
                return  # by another call, while this one waited for it
            started, checkpoint = folder / "command.txt", folder / "checkpoints/last.ckpt"
            before = started.read_text() if started.is_file() else None
            resumed = before == shlex.join(command) and checkpoint.is_file()
            if resumed:
                at = command.index("--overwrite")
                call = [*command[:at], *command[at + 2 :], "--ckpt_path", f"{arm.folder}/checkpoints/last.ckpt"]
            else:
                _empty(folder)
                started.write_text(shlex.join(command))
                call = command
            for each in (call, *then):
                if status := self._call(each, folder / "log.txt", lock):
                    break
            if status:
                if status > 0 and not self._stopped.is_set():
                    started.unlink()  # what fails by itself would fail again from its checkpoint
                last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
                raise ArmFailure(f"exit status {status}: {' '.join(last)} (see {arm.folder}/log.txt)")
            self._write(arm, folder, round(time.perf_counter() - begin, 1), resumed)

    def stop(self) -> None:
        """Ends all that runs; what comes after fails at once. Checkpoints are renamed into place, so that none is left half written."""
        self._stopped.set()
        with self._guard:
            processes = list(self._processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        for process in processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)

    @contextmanager
    def _claimed(self, folder: Path) -> Iterator[int]:
        """One process at a time in a run's folder. The arm's own process holds the lock with us, and after us where we are killed."""
        with open(folder / "lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self._stopped.wait(1.0):
                        raise ArmFailure("stopped while another call was at it") from None
            yield file.fileno()

    def _call(self, command: list[str], log: Path, lock: int) -> int:
        with open(log, "ab") as output, self._guard:
            if self._stopped.is_set():
                raise ArmFailure("stopped before it began")
            # a session of its own: a Ctrl-C is passed on by `stop` alone. The lock lives as long as the process does
            settings: dict[str, Any] = {"start_new_session": True, "pass_fds": (lock,), "env": environment()}
            process = subprocess.Popen([*self.python, *command[1:]], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, **settings)
            self._processes.add(process)
        try:
            return process.wait()
        finally:
            with self._guard:
                self._processes.discard(process)

    def _write(self, arm: Arm, folder: Path, seconds: float, resumed: bool) -> None:
        metrics = json.loads((folder / "metrics.json").read_text())
        content = {"arm": arm.values, "command": arm.line, "commit": commit(), "metrics": metrics, "seconds": seconds, "resumed": resumed}
        if (folder / "config.yaml").is_file():
            config = without_data(yaml.safe_load((folder / "config.yaml").read_text()), self.data or DATA)
            content |= {"parameters": self._parameters(folder), "config": config}
        if (folder / "details.json").is_file():
            content["details"] = json.loads((folder / "details.json").read_text())
        protocol = metrics.get("protocol", {})
        content["data_fingerprint"] = protocol.get("data", {}).get("fingerprint")
        content["machine"] = machine(metrics.pop("machine", {}), protocol.get("versions", {}))
        write_json(self.results / f"{arm.name}.json", content)

    def _parameters(self, folder: Path) -> dict[str, int]:
        """Of encoder, decoder, quantizer and their total, as `summary` counts them; of a prior its total."""
        if (prior := folder / "prior/config.json").is_file():
            return {"total": json.loads(prior.read_text())["parameters"]}
        command = [*self.python, "-m", "gq_lightning", "summary", "--config", str(folder / "config.yaml"), "--format", "json"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise ArmFailure(f"its parameters cannot be counted: {done.stderr.strip()}")
        return json.loads(done.stdout)["parameters"]


def finished(arm: Arm, results: Path) -> dict[str, Any] | None:
    """The measurements of an arm, if its JSON file exists and has the same command."""
    path = results / f"{arm.name}.json"
    content = json.loads(path.read_text()) if path.is_file() else None
    return content if content and content["command"] == arm.line else None


def environment() -> dict[str, str]:
    """Arms run the package of this folder, whichever is installed: a clone of a commit measures that commit."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def commit() -> str | None:
    """The measured commit, marked if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def machine(measured: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """What the seconds belong to."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    facts = {"processor": found[1] if found else platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts |= {"threads": measured.get("threads"), "torch": versions.get("torch")}
    return facts | ({"accelerator": measured["accelerator"]} if "accelerator" in measured else {})


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its workers, too

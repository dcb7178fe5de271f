"""Trains on two nodes and loses each of them once, on one machine, as root, with network namespaces.

    python experiments/drill.py [--out experiments/results/drill.json]

    namespace 0, 10.77.0.1  <-- a pair of virtual interfaces -->  namespace 1, 10.77.0.2
    torchrun, rank 0            (they have no other)              torchrun, rank 1

An undisturbed training first. Then the same command on both nodes; node 1 is killed by SIGKILL, its torchrun and its worker, and node 0
has to end by itself; both are started again and node 0, where the ranks meet, is killed; both are started a third time. The end is
compared with the undisturbed one's, to the bit. Every wait has its limit. The namespaces go with the last word, whatever it is; those that
a killed drill has left go with the next one. Writes drill.json; the exit status is 0 if all went well, 2 where it cannot be tried.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from arms import ROOT
from benchmarks.machine import machine, write
from killed import Life, arguments, difference_of_runs, step_of, write_pictures

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE, PORT, PREFIX = "drill", 29500, "gq-drill"
STEPS = 40
WHOLE, ALONE = 300.0, 60.0  # seconds for a training; for a node to see that the other is gone


class DrillError(Exception):
    """A failure of the drill; the message is one line."""


def obstacle() -> str | None:
    """Why the drill cannot run here; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root: run it by sudo"
    if shutil.which("ip") is None:
        return "there is no ip command: install iproute2"
    name = f"{PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise DrillError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two connected namespaces without any other network."""
    clear(left_behind())
    names = (f"{PREFIX}-{os.getpid()}-0", f"{PREFIX}-{os.getpid()}-1")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        clear(names)


def left_behind() -> list[str]:
    """Namespaces of drills that are gone."""
    names = [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]
    return [name for name in names if not Path(f"/proc/{name.split('-')[2]}").exists()]


def clear(names: Any) -> None:
    """With all that runs in them; the interfaces go with the namespaces."""
    for name in names:
        with suppress(DrillError):
            for pid in ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name)


class Nodes:
    """A training on both.

    Args:
        names: the namespaces.
        call: `-m gq_lightning fit …`
        logs: folder of what the nodes say.
    """

    def __init__(self, names: tuple[str, str], call: list[str], logs: Path) -> None:
        self._stack, self.begin = ExitStack(), time.monotonic()
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "drill")
        self.lives = []
        for name, address in zip(names, ADDRESSES, strict=True):
            torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet)
            # else torchrun asks the machine's name, which knows nothing of these addresses
            here = ("--local-addr", address, "--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}")
            program = ("ip", "netns", "exec", name, *torchrun, *here)
            self.lives.append(self._stack.enter_context(Life(call, logs / f"{name[-1]}.log", program, env=environment)))

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self) -> None:
        for node, life in enumerate(self.lives):
            try:
                status = life.wait(max(1.0, self.begin + WHOLE - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise DrillError(f"node {node} has not ended after {WHOLE:.0f} s: {life.words[-1500:]}") from None
            if status:
                raise DrillError(f"node {node} ended with {status}: {life.words[-1500:]}")

    def lose(self, node: int, last: Path, step: int) -> dict[str, Any]:
        """Kills a node after a step's checkpoint, and reports how the other one ended."""
        while step_of(last) < step:
            if any(life.ended for life in self.lives) or time.monotonic() > self.begin + WHOLE:
                raise DrillError(f"no checkpoint of step {step}: {self.lives[0].words[-1500:]}")
            time.sleep(0.02)
        other = self.lives[1 - node]
        self.lives[node].kill()
        start = time.monotonic()
        try:
            status = other.wait(ALONE)
        except subprocess.TimeoutExpired:
            raise DrillError(f"node {1 - node} still waits {ALONE:.0f} s after node {node} was killed") from None
        seconds = round(time.monotonic() - start, 1)
        lines = [line for line in other.words.splitlines() if line.startswith("error: ")]
        if not status or not lines or "--ckpt_path last" not in lines[0]:
            raise DrillError(f"node {1 - node} ended with {status} and does not say how to go on: {other.words[-1500:]}")
        print(f"node {node} killed at step {step_of(last)}; node {1 - node} ended {seconds} s later:\n  {lines[0]}", flush=True)
        return {"node": node, "goes_on_from_step": step_of(last), "seconds_until_the_other_ended": seconds}


def trial(folder: Path) -> dict[str, Any]:
    pictures, last = write_pictures(folder / "pictures"), folder / "killed/checkpoints/last.ckpt"
    whole, killed = ([*arguments(pictures, folder, name, 2, 2), f"--trainer.max_steps={STEPS}"] for name in ("whole", "killed"))
    with namespaces() as names:
        with Nodes(names, whole, folder / "whole") as nodes:
            nodes.finish()
            print(f"undisturbed: {STEPS} steps on two nodes in {time.monotonic() - nodes.begin:.0f} s", flush=True)
        lost = []
        for node, step in ((1, 6), (0, 20)):
            with Nodes(names, killed, folder / "logs") as nodes:
                lost.append(nodes.lose(node, last, step))
        with Nodes(names, killed, folder / "logs") as nodes:
            nodes.finish()
    return {"steps": STEPS, "lost": lost, "difference": difference_of_runs(folder / "whole", folder / "killed")}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains on two nodes, which are network namespaces, and loses each of them once.")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/drill.json")
    options = parser.parse_args(words)
    if (reason := obstacle()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    # the namespaces go on SIGTERM as they do on Ctrl-C
    before, begin = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)), time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = trial(Path(folder))
    except DrillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    passed = result["difference"] is None
    end = "the undisturbed training's to the bit" if passed else f"not the undisturbed training's: {result['difference']}"
    sentence = f"Each of two nodes was lost once and the training went on; its end is {end}."
    facts = {"command": "python experiments/drill.py", "machine": machine() | {"threads": 1}, "seconds": round(time.monotonic() - begin, 1)}
    write({**facts, "verdict": sentence, "passed": passed, **result}, options.out)
    print(sentence)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

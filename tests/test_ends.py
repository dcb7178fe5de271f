"""Trainings through the command line that are told to stop, or lose a rank: how they end, within which time, and that they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killed import CONFIGS, Life, arguments, difference_of_runs, step_of, write_pictures

SECONDS = 60.0  # in which all of a training ends; most of it for a loaded machine
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def begin(pictures: Path, runs: Path, ranks: int, torchrun: bool, *more: str) -> Life:
    program = (*TORCHRUN, str(ranks)) if torchrun else (sys.executable,)
    return Life([*arguments(pictures, runs, "run", ranks), *more], runs / "run.log", program, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(life: Life, last: Path, step: int) -> None:
    until = time.monotonic() + 200
    while step_of(last) < step:
        assert not life.ended and time.monotonic() < until, life.words[-3000:]
        time.sleep(0.05)


slow = pytest.mark.slow
LOST = [
    pytest.param(2, 1, False, id="two"),
    pytest.param(2, 0, False, id="two, the first", marks=slow),
    pytest.param(4, 2, False, id="four", marks=slow),
    pytest.param(2, 1, True, id="torchrun, two", marks=slow),
    pytest.param(4, 0, True, id="torchrun, four", marks=slow),
]


@pytest.mark.parametrize(("ranks", "victim", "torchrun"), LOST)
def test_a_killed_rank(ranks: int, victim: int, torchrun: bool, tmp_path: Path, pictures: Path) -> None:
    last = tmp_path / "run/checkpoints/last.ckpt"
    with begin(pictures, tmp_path, ranks, torchrun, "--trainer.max_steps=100000") as life:
        wait_for_step(life, last, 3)
        processes = life.ranks()
        assert sorted(processes) == list(range(ranks))
        os.kill(processes[victim], signal.SIGKILL)
        start = time.monotonic()
        status = life.wait(SECONDS)
        while any(alive(process) for process in processes.values()):
            assert time.monotonic() - start < SECONDS, "a rank stays behind"
            time.sleep(0.1)
        lines = [line for line in life.words.splitlines() if line.startswith("error: ")]
    go_on = f"the same command with --ckpt_path last resumes from {last}"
    assert all("has lost contact with another rank (" in line and line.endswith(go_on) for line in lines)
    # Lightning's launcher, in the first rank, may notice sooner than a collective fails, and kills all with words of its own
    assert lines or (not torchrun and "Forcefully terminating all other processes" in life.words)
    assert status in ([1] if torchrun else [75, -signal.SIGKILL])
    if (ranks, victim, torchrun) == (2, 1, False):
        return  # the quick one; others go on here, and in the soak
    steps = step_of(last) + 3
    with begin(pictures, tmp_path, ranks, torchrun, f"--trainer.max_steps={steps}") as life:
        assert life.wait(200) == 0, life.words[-3000:]
    assert step_of(last) == steps


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


TOLD = [
    pytest.param(1, "group", False, id="group"),
    pytest.param(2, "group", False, id="group of two", marks=slow),
    pytest.param(2, "second", False, id="the second of two", marks=slow),
    pytest.param(2, "first", True, id="torchrun", marks=slow),
]


@pytest.mark.parametrize(("ranks", "whom", "torchrun"), TOLD)
def test_sigterm(ranks: int, whom: str, torchrun: bool, tmp_path: Path, pictures: Path) -> None:
    """Saved at once, by one line and status 143; and it goes on as if it had never stopped."""
    last = tmp_path / "run/checkpoints/last.ckpt"
    with begin(pictures, tmp_path, ranks, torchrun, "--last.every_n_train_steps=4") as life:
        wait_for_step(life, last, 4)
        if whom == "group":
            os.killpg(life.process.pid, signal.SIGTERM)
        else:
            os.kill(life.ranks()[1] if whom == "second" else life.process.pid, signal.SIGTERM)
        status, words = life.wait(SECONDS), life.words
        assert not life.survivors()
    step = step_of(last)
    assert 4 <= step < 24
    lines = [line for line in words.splitlines() if line.startswith(("stopped by", "error:"))]
    assert lines == [f"stopped by SIGTERM after step {step}: {last} is written; the same command with --ckpt_path last resumes from there"]
    assert status == (1 if torchrun else 143)
    assert torchrun or "Traceback" not in words
    if ranks > 1:  # of one process test_resume tells more
        with begin(pictures, tmp_path, ranks, torchrun, "--last.every_n_train_steps=4") as life:
            assert life.wait(200) == 0, life.words[-3000:]
        whole = [sys.executable, *arguments(pictures, tmp_path, "whole", ranks), "--last.every_n_train_steps=4"]
        subprocess.run(whole, check=True, capture_output=True, timeout=200)
        assert difference_of_runs(tmp_path / "whole", tmp_path / "run") is None


SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
exec "$@"
"""


@pytest.mark.slow
def test_a_slurm_job_is_requeued(tmp_path: Path, pictures: Path) -> None:
    """The batch script under a stand-in for srun and scontrol: twice the same line, with SIGUSR1 to all processes in between."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": f"#!/bin/sh\necho $* >>{tmp_path}/calls\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "SLURM_JOB_ID": "12345", "OMP_NUM_THREADS": "1"}
    more = ("--trainer.num_nodes=1", "--last.every_n_train_steps=4")
    call = [str(CONFIGS / "machine/slurm.sbatch"), *arguments(pictures, tmp_path, "run")[3:], *more]
    last = tmp_path / "run/checkpoints/last.ckpt"
    with Life(call, tmp_path / "log", ("bash",), env=environment) as life:
        wait_for_step(life, last, 4)
        os.killpg(life.process.pid, signal.SIGUSR1)
        assert life.wait(SECONDS) == 128 + signal.SIGUSR1
        step = step_of(last)
        assert f"stopped by SIGUSR1 after step {step}: {last} is written; job 12345 is requeued" in life.words.splitlines()
        assert f"{last.parent}: no last checkpoint yet, so the training starts from the beginning" in life.words.splitlines()
    assert (tmp_path / "calls").read_text() == "requeue 12345\n" and step < 24
    with Life(call, tmp_path / "log", ("bash",), env=environment) as life:
        assert life.wait(200) == 0, life.words[-3000:]
        assert "no last checkpoint yet" not in life.words
    whole = [sys.executable, *arguments(pictures, tmp_path, "whole"), "--last.every_n_train_steps=4"]
    subprocess.run(whole, check=True, capture_output=True, timeout=200)
    assert difference_of_runs(tmp_path / "whole", tmp_path / "run") is None


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, pictures: Path) -> None:
    """A real one: the checkpoint before stays, one line says what happened, and where there is room again the training goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        last = disk / "run/checkpoints/last.ckpt"
        with begin(pictures, disk, 1, False, "--trainer.max_steps=100000") as life:
            wait_for_step(life, last, 3)
            with pytest.raises(OSError, match="No space left"), open(disk / "all the rest", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            assert life.wait(SECONDS) == 2
            line = f"error: {last}: the checkpoint could not be written (No space left on device), the one before it is kept"
            assert life.words.splitlines()[-1] == line
        step = step_of(last)
        assert step >= 3 and [path.name for path in last.parent.iterdir() if path.name.startswith(".")] == []
        (disk / "all the rest").unlink()
        with begin(pictures, disk, 1, False, f"--trainer.max_steps={step + 3}") as life:
            assert life.wait(200) == 0, life.words[-3000:]
        assert step_of(last) == step + 3
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)

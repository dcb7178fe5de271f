import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gq_lightning import UserError
from gq_lightning.callbacks import CheckpointFiles

OLD, NEW = {"weights": torch.zeros(1000)}, {"weights": torch.ones(300_000)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    CheckpointFiles().save_checkpoint(OLD, path)
    return path


def held(path: Path) -> torch.Tensor:
    return CheckpointFiles().load_checkpoint(path, weights_only=True)["weights"]


def test_round_trip(path: Path) -> None:
    assert torch.equal(held(path), OLD["weights"])
    CheckpointFiles().save_checkpoint(NEW, str(path))
    assert torch.equal(held(path), NEW["weights"])
    assert os.listdir(path.parent) == ["last.ckpt"]
    CheckpointFiles().remove_checkpoint(path)
    assert os.listdir(path.parent) == []
    with pytest.raises(FileNotFoundError):
        held(path)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.witness,)


def test_no_code_of_a_checkpoint_is_run(path: Path, tmp_path: Path) -> None:
    torch.save(OLD | {"extra": Code(tmp_path / "witness")}, path)
    for weights_only in (None, True):
        with pytest.raises(UserError, match=r"last\.ckpt: damaged, not a checkpoint, or holds more") as error:
            CheckpointFiles().load_checkpoint(path, weights_only=weights_only)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "witness").exists()
    # as asked for
    CheckpointFiles().load_checkpoint(path, weights_only=False)
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_what_is_no_checkpoint(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt: damaged"):
        CheckpointFiles().load_checkpoint(path)


def test_half_a_checkpoint(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"last\.ckpt: damaged"):
        CheckpointFiles().load_checkpoint(path)


CUT_SHORT = """
import os, sys, torch
from gq_lightning.callbacks import CheckpointFiles

def save(checkpoint, file):
    file.write(b"half a checkpoint")
    file.flush()
    os._exit(9)

torch.save = save
CheckpointFiles().save_checkpoint({}, sys.argv[1])
"""


def test_a_write_that_was_cut_short_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(OLD, path)
    assert subprocess.run([sys.executable, "-c", CUT_SHORT, str(path)], timeout=100).returncode == 9
    assert torch.equal(held(path), OLD["weights"])
    assert len(os.listdir(tmp_path)) == 2, "a killed process does not tidy up"
    CheckpointFiles().save_checkpoint(NEW, path)
    assert torch.equal(held(path), NEW["weights"])
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_the_file_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, flush, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), rename(*names)))
    CheckpointFiles().save_checkpoint(NEW, path)
    assert events == ["flush", "rename", "flush"]


FULL = """
import resource, signal, sys, torch
from gq_lightning import UserError
from gq_lightning.callbacks import CheckpointFiles

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    CheckpointFiles().save_checkpoint({"weights": torch.ones(300_000)}, sys.argv[1])
except UserError as error:
    print(error)
"""


def test_no_room(path: Path) -> None:
    """The kernel itself refuses to write on: here since the file would be larger than allowed."""
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{path}: the checkpoint could not be written (File too large), the one before it is kept\n", done.stderr
    assert torch.equal(held(path), OLD["weights"])
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_disk_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^\S+new.ckpt: the checkpoint could not be written \(No space left on device\), there is none"):
        CheckpointFiles().save_checkpoint(NEW, tmp_path / "new.ckpt")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_pickled_is_no_matter_of_the_disk(path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        CheckpointFiles().save_checkpoint({"weights": lambda: None}, path)
    assert torch.equal(held(path), OLD["weights"])


LOOP = """
import itertools, sys, torch
from gq_lightning.callbacks import CheckpointFiles

for count in itertools.count():
    CheckpointFiles().save_checkpoint({"weights": torch.full((5_000_000,), count)}, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(8))
def test_killed_while_it_writes(path: Path, moment: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", LOOP, str(path)])
    before = path.stat().st_mtime_ns
    while process.poll() is None and path.stat().st_mtime_ns == before:
        time.sleep(0.01)
    time.sleep(0.017 * moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(held(path).unique()) == 1

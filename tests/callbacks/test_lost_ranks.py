"""What is a lost rank and what is not; whole trainings that lose one are in test_ends."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from gq_lightning.callbacks import LostRanks
from gq_lightning.callbacks.surviving import lost_ranks

GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:4. This is typically caused by bugs"
AT_ONCE = "Connection closed by peer [10.0.0.2]:4"


class Left(Exception):
    pass


def leave(status: int) -> None:
    raise Left(status)


def trainer(folder: Path, world_size: int = 2, kill: Any = lambda number: None) -> Any:
    launcher = SimpleNamespace(kill=kill)
    facts = {"world_size": world_size, "global_rank": 0, "loggers": [], "checkpoint_callbacks": [], "default_root_dir": folder}
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), **facts)


@pytest.fixture(autouse=True)
def _stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(lost_ranks.socket, "gethostname", lambda: "here")


@pytest.mark.parametrize(("exception", "reason"), [(RuntimeError(GLOO), AT_ONCE), (distributed.DistNetworkError("no route"), "no route")])
def test_contact_is_lost(exception: Exception, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Left, match="75"):
        LostRanks().on_exception(trainer(tmp_path), None, exception)  # type: ignore[arg-type]
    assert capfd.readouterr().err == f"error: rank 0 on here has lost contact with another rank ({reason}); there is no checkpoint yet\n"


def test_what_this_process_began_ends_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    last, signals = tmp_path / "checkpoints/last.ckpt", list[int]()
    last.touch()
    with pytest.raises(Left, match="75"):
        LostRanks().on_exception(trainer(tmp_path, kill=signals.append), None, RuntimeError(GLOO))  # type: ignore[arg-type]
    line = (
        f"error: rank 0 on here has lost contact with another rank ({AT_ONCE}); the same command with --ckpt_path last resumes from {last}"
    )
    assert capfd.readouterr().err.splitlines() == [line]
    assert signals == [signal.SIGKILL]


@pytest.mark.parametrize(
    "exception", [RuntimeError("shapes do not fit"), RuntimeError("DataLoader timed out after 5 seconds"), KeyError("gloo")]
)
def test_other_errors_take_their_usual_way(exception: Exception, tmp_path: Path) -> None:
    LostRanks().on_exception(trainer(tmp_path), None, exception)  # type: ignore[arg-type]


def test_one_process_has_no_other_ranks(tmp_path: Path) -> None:
    LostRanks().on_exception(trainer(tmp_path, world_size=1), None, RuntimeError(GLOO))  # type: ignore[arg-type]

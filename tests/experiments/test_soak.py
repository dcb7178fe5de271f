"""The trials of killed trainings in short; and that they would find out what they are there to find out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import drill
import soak
from gq_lightning.files import whole_file
from killed import Life, descendants, difference
from soak import Files, verdict


@pytest.mark.parametrize(("kills", "ranks"), [pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_short_soak(kills: int, ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    soak.main(["--kills", str(kills), "--ranks", str(ranks), "--seed", str(os.getpid()), "--out", str(out)])
    content, words = json.loads(out.read_text()), capfd.readouterr().out.splitlines()
    # a kill may come too late to fall within a write; that the end is the same is the promise
    assert content["difference"] is None, content
    assert len(content["kills"]) == kills == sum(line.startswith("kill ") for line in words)
    assert words[-1] == content["verdict"]


def test_the_verdict_can_be_bad() -> None:
    kill = {"in_a_write": True}
    good: dict[str, Any] = {"kills": [kill, kill], "difference": None}
    assert verdict(good, 2) == (True, "2 of 2 kills, 2 of them within a checkpoint's write: its end is the undisturbed run's to the bit.")
    for change in ({"difference": "last.ckpt/state_dict/x"}, {"kills": [kill]}, {"kills": [{"in_a_write": False}] * 2}):
        assert not verdict(good | change, 2)[0], change


def test_a_bit_is_a_difference() -> None:
    state = {"a": [torch.zeros(3), (1, "x")], "b": {"c": 0.5}}
    assert difference(state, {"a": [torch.zeros(3), (1, "x")], "b": {"c": 0.5}}) is None
    bit = torch.tensor([0.0, 1e-45, 0.0])
    assert difference(state, state | {"a": [bit, (1, "x")]}) == "/a/0"
    assert difference(state, state | {"a": [torch.zeros(3), (2, "x")]}) == "/a/1/0: 1 and 2"
    assert difference(state, state | {"b": {}}, "it") == "it/b: ['c'] in one of them alone"
    assert difference(state, state | {"a": [torch.zeros(3)]}) == "/a: 2 and 1 items"
    assert difference(state, state | {"b": 0.5}) == "/b: dict, float"


def test_a_write_is_told_from_what_an_older_one_has_left(tmp_path: Path) -> None:
    assert Files(tmp_path / "not there yet").being_written() is None
    (tmp_path / ".last.ckpt.0123456789ab.tmp").write_bytes(b"half")
    files = Files(tmp_path)
    assert files.being_written() is None and files.written() == 0
    with whole_file(tmp_path / "last.ckpt") as file:
        file.write(b"halves")
        file.flush()
        assert files.being_written() == 6
    assert files.being_written() is None and files.written() > 0


CHILDREN = """
import subprocess, sys, time
children = [subprocess.Popen(["sleep", "100"]), subprocess.Popen(["sleep", "100"], start_new_session=True)]
print("begun", flush=True)
time.sleep(100)
"""


def test_a_kill_leaves_nobody(tmp_path: Path) -> None:
    """Neither in the process group nor out of it."""
    with Life(["-c", CHILDREN], tmp_path / "log") as life:
        while "begun" not in life.words:
            assert not life.ended
        family = descendants(life.process.pid)
        assert len(family) == 2
        life.kill()
        assert not life.survivors() and not descendants(life.process.pid)
    for pid in family:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    if (reason := drill.obstacle()) is not None:
        pytest.skip(reason)
    call = [sys.executable, drill.__file__, "--out", str(tmp_path / "drill.json")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((tmp_path / "drill.json").read_text())
    assert [lost["node"] for lost in content["lost"]] == [1, 0]
    assert all(lost["seconds_until_the_other_ended"] < 60 for lost in content["lost"])
    assert not drill.left_behind()


def test_where_no_drill_is_possible(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert drill.main(["--out", str(tmp_path / "no.json")]) == 2
    assert capfd.readouterr().err == "error: network namespaces need Linux and root: run it by sudo\n"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert drill.main(["--out", str(tmp_path / "no.json")]) == 2
    assert "install iproute2" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())

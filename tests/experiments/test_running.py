"""Arms as processes: what is skipped, what fails, what goes on, and that nothing is lost. The first tests run a script in their place."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import reproduce
from arms import ROOT, Arm, arms, choose, layered, read
from reproduce import Progress
from running import ArmFailure, Runner, finished

FAKE = """
import json, os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder = Path(options["--runs"]) / options["--name"]
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "calls.txt").open("a").write(" ".join(sys.argv[4:]) + chr(10))
(folder / "checkpoints/last.ckpt").touch()
if options["--what"] == "bad":
    sys.exit("it went wrong")
if options["--what"] == "slow" and "--ckpt_path" not in options:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
facts = {"protocol": {"data": {"fingerprint": "f"}, "versions": {"torch": "2"}}, "machine": {"threads": 3, "platform": "a host"}}
(folder / "metrics.json").write_text(json.dumps({"psnr": 20.0, "bits_per_pixel": 0.25, **facts}))
"""
SPEC: dict[str, Any] = {
    "configs": ["a.yaml"],
    "axes": {"what": ["good", "bad", "fine"]},
    "arguments": {"what": "--what {} --root DATA"},
    "table": {"rows": "what", "columns": ["psnr", "rfid"]},
}


class Bench:
    """A spec whose arms are the script above."""

    def __init__(self, folder: Path, **axes: list[str]) -> None:
        (folder / "fake.py").write_text(FAKE)
        self.spec = SPEC | {"axes": SPEC["axes"] | axes}
        self.arms, self.results, self.runs = arms(self.spec, str(folder / "runs")), folder / "results", folder / "runs"
        self.runner = Runner(self.results, "/my pictures", (sys.executable, str(folder / "fake.py")))

    def progress(self) -> Progress:
        return Progress("bench", self.arms, self.results, {}, 2)

    def calls(self, name: str) -> list[str]:
        path = self.runs / name / "calls.txt"
        return path.read_text().splitlines() if path.is_file() else []


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_a_failure_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    progress = bench.progress()
    reproduce.run(progress, bench.runner, Console(quiet=True))
    assert list(progress.failures) == ["bad"]
    assert "exit status 1: it went wrong" in progress.failures["bad"]
    assert sorted(path.name for path in bench.results.iterdir()) == ["fine.json", "good.json"], "no temporary files either"
    reproduce.show(bench.spec, bench.arms, bench.results, "call")
    assert (tmp_path / "results.md").read_text().endswith("|---|---|---|\n| good | 20.00 |  |\n| fine | 20.00 |  |\n")


def test_a_log_file_has_a_plain_line_for_each_arm(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    progress = Progress("bench", bench.arms, bench.results, {}, 1)
    with open(tmp_path / "log", "w") as log:
        reproduce.run(progress, bench.runner, Console(file=log))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["good", "bad", "fine"]
    assert "done; 1 of 3 arms, " in lines[0] and lines[0].endswith(" left")
    assert "failed; 1 of 3 arms, 1 failed, " in lines[1]
    assert "done; 2 of 3 arms, 1 failed, " in lines[2]
    assert not {"\x1b", "\r"} & set("".join(lines))


def test_results_may_lie_elsewhere_and_arms_run_the_package_of_this_folder(tmp_path: Path) -> None:
    """What is called from a clone of a fixed commit writes where it is told, and does not measure the installed package."""
    bench = Bench(tmp_path, what=["good"])
    (tmp_path / "fake.py").write_text(FAKE + "import gq_lightning; (folder / 'where').write_text(gq_lightning.__file__)")
    runner = Runner(tmp_path / "far/away", "/my pictures", bench.runner.python)
    runner.run(bench.arms[0])
    assert (tmp_path / "far/away/good.json").is_file()
    assert Path((bench.runs / "good/where").read_text()).is_relative_to(ROOT)


def test_arms_on_another_device_count_as_the_same_arms(tmp_path: Path) -> None:
    bench = Bench(tmp_path, what=["good"])
    runner = Runner(bench.results, "/my pictures", bench.runner.python, accelerator="gpu")
    for _ in range(2):
        runner.run(bench.arms[0])
    (call,) = bench.calls("good")
    assert call.endswith(" --trainer.accelerator gpu")
    assert "accelerator" not in json.loads((bench.results / "good.json").read_text())["command"]
    bench.runner.run(bench.arms[0])
    assert len(bench.calls("good")) == 1


def test_what_is_there_can_be_shown_while_the_rest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path)
    bench.runner.run(bench.arms[0])
    (tmp_path / "spec.yaml").write_text(json.dumps(SPEC))
    os.renames(bench.results / "good.json", tmp_path / "shown/spec/good.json")
    where = ["--results", str(tmp_path / "shown"), "--runs", str(tmp_path / "elsewhere")]
    assert reproduce.main([str(tmp_path / "spec.yaml"), "--show", *where]) == 0
    assert "20" not in capsys.readouterr().out, "another command's"
    content = json.loads((tmp_path / "shown/spec/good.json").read_text())
    content["command"] = arms(SPEC, f"{tmp_path}/elsewhere/spec")[0].line
    (tmp_path / "shown/spec/good.json").write_text(json.dumps(content))
    assert reproduce.main([str(tmp_path / "spec.yaml"), "--show", *where]) == 0
    assert "| good | 20.00 |  |" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_written_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    bench = Bench(tmp_path, what=["good"])
    bench.runner.run(bench.arms[0])
    assert "--root /my pictures" in bench.calls("good")[0]
    content = json.loads((bench.results / "good.json").read_text())
    assert "--root DATA" in content["command"]
    assert "/my pictures" not in json.dumps(content)
    assert "a host" not in json.dumps(content)
    assert (content["arm"], content["data_fingerprint"], content["resumed"]) == ({"what": "good"}, "f", False)
    assert content["machine"].items() >= {"cores": os.cpu_count(), "threads": 3, "torch": "2"}.items()


def test_finished_is_what_came_from_the_same_command(tmp_path: Path) -> None:
    bench = Bench(tmp_path, what=["good"])
    arm = bench.arms[0]
    assert finished(arm, bench.results) is None
    bench.runner.run(arm)
    assert bench.progress().waiting == []
    bench.runner.run(arm)
    assert len(bench.calls("good")) == 1, "skipped"
    other = Arm(arm.name, arm.values, arm.settings, [*arm.command, "--more", "1"], arm.folder)
    assert finished(other, bench.results) is None
    bench.runner.run(other)
    assert len(bench.calls("good")) == 1, "another command begins in an empty folder"
    assert "--more 1" in bench.calls("good")[0]
    assert json.loads((bench.results / "good.json").read_text())["resumed"] is False


def test_killed_it_goes_on_and_failed_it_begins_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, what=["slow", "bad"])
    slow, bad = bench.arms
    pid = bench.runs / "slow/pid"
    killer = threading.Thread(
        target=lambda: (until(lambda: pid.is_file() and pid.read_text()), os.kill(int(pid.read_text()), signal.SIGKILL))
    )
    killer.start()
    with pytest.raises(ArmFailure, match="exit status -9"):
        bench.runner.run(slow)
    killer.join()
    bench.runner.run(slow)
    assert bench.calls("slow")[1].endswith(f"--ckpt_path {bench.runs}/slow/checkpoints/last.ckpt")
    assert "--overwrite" not in bench.calls("slow")[1]
    assert json.loads((bench.results / "slow.json").read_text())["resumed"] is True
    for _ in range(2):
        with pytest.raises(ArmFailure, match="it went wrong"):
            bench.runner.run(bad)
        assert len(bench.calls("bad")) == 1
        assert "--ckpt_path" not in bench.calls("bad")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_arms_too(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "bench.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
import reproduce
from pathlib import Path
start = reproduce.Runner.__init__
reproduce.Runner.__init__ = lambda self, *given, **_: start(self, *given, (sys.executable, {str(tmp_path / "fake.py")!r}))
sys.exit(reproduce.main(sys.argv[1:]))
""")
    spec = SPEC | {"axes": {"what": ["slow", "slow "]}, "arguments": {"what": "--what slow"}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    (tmp_path / "fake").mkdir()
    call = [sys.executable, str(tmp_path / "bench.py"), str(tmp_path / "spec.yaml"), "--jobs", "2"]
    pids = [tmp_path / f"runs/spec/{name}/pid" for name in ("slow", "slow ")]
    process = os.posix_spawn(
        sys.executable, [*call, "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")], dict(os.environ)
    )
    until(lambda: all(path.is_file() and path.read_text() for path in pids))
    os.kill(process, number)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == reproduce.INTERRUPTED
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not list((tmp_path / "results/spec").iterdir())


def test_two_calls_do_not_share_a_folder(tmp_path: Path) -> None:
    """An arm outlives the call that started it where that one is killed; the next call waits for it."""
    bench = Bench(tmp_path, what=["slow"])
    arm, pid, failures = bench.arms[0], bench.runs / "slow/pid", []

    def first() -> None:
        with pytest.raises(ArmFailure):
            bench.runner.run(arm)
        failures.append("first")

    runner = threading.Thread(target=first)
    runner.start()
    until(lambda: pid.is_file() and pid.read_text())
    another = Runner(bench.results, "/my pictures", bench.runner.python)
    second = threading.Thread(target=another.run, args=(arm,))
    second.start()
    time.sleep(0.5)
    assert second.is_alive()
    assert len(bench.calls("slow")) == 1
    bench.runner.stop()
    runner.join()
    second.join(30)
    assert failures == ["first"]
    assert len(bench.calls("slow")) == 2
    assert finished(arm, bench.results) is not None


@pytest.mark.slow
def test_two_arms_for_real_one_of_them_killed(tmp_path: Path) -> None:
    """A ViT under GQ and a UNet under FSQ, at the size of the smoke profile, from the command line to figures.

    What was killed ends with the metrics of an arm that was not.
    """
    spec = choose(read(ROOT / "experiments/fig1.yaml"), "smoke")
    longer = layered(spec, {"overrides": {"trainer.max_steps": 300, "last.every_n_train_steps": 10}})
    planned = {arm.name: arm for arm in arms(longer, str(tmp_path / "runs"))}
    gq, fsq = planned["vit-gq-16-0"], planned["unet-fsq-16-0"]
    results = tmp_path / "results"
    runner = Runner(results)

    def kill() -> None:
        until((tmp_path / "runs/vit-gq-16-0/checkpoints/last.ckpt").is_file, 120)
        for process in runner._processes:
            os.killpg(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ArmFailure, match="exit status -9"):
        runner.run(gq)
    killer.join()
    for arm in (gq, fsq):
        runner.run(arm)
    measured = [finished(arm, results) for arm in (gq, fsq)]
    assert [content["resumed"] for content in measured if content] == [True, False]
    for arm, content in zip((gq, fsq), measured, strict=True):
        assert content is not None
        assert content["metrics"]["steps"] == 300
        assert content["metrics"]["bits_per_pixel"] == 0.25
        assert ("gaussian_psnr" in content["metrics"]) == (arm is gq)
        assert content["config"]["data"]["init_args"]["image_size"] == 32
        assert content["parameters"]["total"] > 10_000
    (whole,) = (arm for arm in arms(longer, str(tmp_path / "undisturbed")) if arm.name == gq.name)
    undisturbed = Runner(tmp_path / "others")
    undisturbed.run(whole)
    contents = (finished(gq, results), finished(whole, undisturbed.results))
    killed, expected = (
        {name: value for name, value in content["metrics"].items() if not name.endswith("seconds")} for content in contents if content
    )
    assert killed == expected
    reproduce.show(spec, list(planned.values()), results, "call")
    assert {"fig1.png", "fig1.svg", "fig1.csv", "fig1.md"} <= {path.name for path in results.iterdir()}

"""Whose a run's folder is, what is in it, and what is left of it when it is overwritten."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from small import CONFIGS

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.cli.main import main
from gq_lightning.files import RunFolder

# claims the folder, forks what a loader's worker would be, says so, and waits to be killed
HOLD = """
import os, sys, time
from gq_lightning.files import RunFolder

with RunFolder(sys.argv[1]).claimed(go_on=True, overwrite=False):
    worker = os.fork()
    if worker == 0:
        time.sleep(100)
        os._exit(0)
    print(worker, flush=True)
    time.sleep(100)
"""
FILES = ("base", "backbone/vit_small", "data/photographs", "scale/smoke", "machine/cpu", "quantizer/gq")
FIT = [
    "fit",
    *(word for name in FILES for word in ("--config", str(CONFIGS / f"{name}.yaml"))),
    *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
    *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
    *(
        "--trainer.enable_progress_bar=false",
        "--export.rfid=false",
        "--export.columns=3",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
    ),
]
# what is not the run's own stays
FOREIGN = ("lock", "log.txt", "command.txt", "details.json", "notes/plan.md")
OWN = (
    *("config.yaml", "hparams.yaml", "metrics.json", "reconstructions.png", "broken_pictures.txt", "events.out.tfevents.1.host.2.0"),
    *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/.last.ckpt.0123456789ab.tmp"),
    *(
        "version_3/metrics.csv",
        "metrics.csv",
        "tokenizer/config.json",
        "tokens/a/b.png.tokens",
        "non_finite/epoch0-batch1-rank0.png",
    ),
)


def fill(folder: Path) -> None:
    for name in (*FOREIGN, *OWN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("before")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_one_fit_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Until it is killed; its workers, which may live a little longer, hold nothing. Resumed and overwriting runs have to wait, too."""
    fill(tmp_path / "x")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        line = f"error: {tmp_path}/x: another fit is writing there: wait until it ends, or choose another --name"
        for more in ([], ["--overwrite=true"], ["--ckpt_path=last"]):
            assert main([*FIT, f"--runs={tmp_path}", "--name=x", *more]) == 2
            assert capfd.readouterr().err.splitlines()[-1] == line
        assert set(OWN) < files(tmp_path / "x")
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)
        with RunFolder(tmp_path / "x").claimed(go_on=True, overwrite=False):
            pass
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.communicate()
    assert files(tmp_path / "x") == {*OWN, *FOREIGN}, "no trace of the claims"


def test_of_many_one_has_it(tmp_path: Path) -> None:
    inside, most, refused, claimed = [0], [0], list[str](), [0]
    start = threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        for _ in range(40):
            try:
                with RunFolder(tmp_path / "x").claimed(go_on=False, overwrite=False):
                    inside[0] += 1
                    most[0], claimed[0] = max(most[0], inside[0]), claimed[0] + 1
                    inside[0] -= 1
            except UserError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and claimed[0] + len(refused) == 320 and claimed[0] > 0
    assert not list(tmp_path.iterdir()), "a fit that has written nothing leaves no folder"


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_rank_0_claims_for_all(tmp_path: Path, environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with RunFolder(tmp_path).claimed(go_on=True, overwrite=False):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if first:
            with pytest.raises(UserError, match="another fit is writing there"), RunFolder(tmp_path).claimed(go_on=True, overwrite=False):
                pass
        else:
            with RunFolder(tmp_path).claimed(go_on=False, overwrite=True):
                pass


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    fill(tmp_path)
    run = RunFolder(tmp_path)
    with (
        pytest.raises(UserError, match=r"a run exists there already; --ckpt_path last resumes it"),
        run.claimed(go_on=False, overwrite=False),
    ):
        pass
    with run.claimed(go_on=True, overwrite=True):
        assert files(tmp_path) - {".claim"} == {*OWN, *FOREIGN}
    with run.claimed(go_on=False, overwrite=True):
        assert files(tmp_path) - {".claim"} == {*OWN, *FOREIGN}
        run.clear()
        assert files(tmp_path) - {".claim"} == set(FOREIGN)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name.split("/")[0] for name in FOREIGN)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.quantizer.init_args.bits_per_position=13"],
        ["--data.init_args.image_size=36"],
        ["--data=gq_lightning.data.ImageFolder", "--data.init_args.root=/nowhere"],
        ["--init_from=/nowhere"],
        ["--trainer.devices=0"],
    ],
)
def test_a_run_that_is_refused_costs_the_old_one_nothing(wrong: list[str], tmp_path: Path) -> None:
    fill(tmp_path / "x")
    before = {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")}
    assert main([*FIT, f"--runs={tmp_path}", "--name=x", "--overwrite=true", *wrong]) == 2
    assert {name: (tmp_path / "x" / name).read_bytes() for name in files(tmp_path / "x")} == before


def test_a_link_to_a_larger_disk_stays(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    fill(run)
    RunFolder(run).clear()
    assert (run / "checkpoints").is_symlink() and not list(disk.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: nothing can be written there"), RunFolder(tmp_path / "file/x").claimed(False, False):
        pass


def test_the_folder_is_the_same_whatever_the_logger_is(tmp_path: Path) -> None:
    """And nothing of an overwritten run is left, nor anything else gone."""
    fill(tmp_path / "x")
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}/curves"]
    assert main([*FIT, f"--runs={tmp_path}", "--name=x", "--overwrite=true", *logger]) == 0
    run = RunFolder(tmp_path / "x")
    tokenizer = {f"tokenizer/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    made = {"config.yaml", "metrics.json", "reconstructions.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt", *tokenizer}
    assert files(run.path) == {*made, *FOREIGN}
    assert {(run.path / name).read_text() for name in FOREIGN} == {"before"}
    assert not {path.name for path in (tmp_path / "curves").rglob("*")} & {"config.yaml", "checkpoints", "metrics.json"}
    assert ImageTokenizer.from_pretrained(run.tokenizer).fingerprint == json.loads(run.metrics.read_text())["tokenizer_fingerprint"]
    config = yaml.safe_load(run.config.read_text())
    assert config["name"] == "x" and config["checkpoint"]["dirpath"] is None, "it serves for another --name"
    assert config["trainer"]["logger"]["class_path"].endswith("CSVLogger")

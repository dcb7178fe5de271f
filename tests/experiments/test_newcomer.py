"""What somebody sees who calls for Figure 1 with little or nothing: what is about to happen, on which pictures, and how to go on."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

import reproduce
from arms import ROOT


def test_without_data_the_projects_own_download_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a results folder of its own, as the commands are those of any DATA."""
    seen: dict[str, Any] = {}

    def downloads(root: Path, size: str, download: bool) -> None:
        seen.update(root=Path(root), size=size)

    monkeypatch.setattr("torchvision.datasets.Imagenette", downloads)
    monkeypatch.setattr("pictures.ROOT", tmp_path)
    (tmp_path / "datasets/imagenette/imagenette2-160").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "run", lambda progress, runner, console: seen.update(data=runner.data, results=runner.results))
    assert reproduce.main([str(ROOT / "experiments/fig1.yaml"), "--profile", "cpu", "--results", str(tmp_path / "results")]) == 0
    assert (seen["root"], seen["size"]) == (tmp_path / "datasets/imagenette", "160px")
    assert seen["data"] == str(tmp_path / "datasets/imagenette/imagenette2-160")
    assert seen["results"] == tmp_path / "results/fig1/cpu-imagenette"
    given = ["--data", str(tmp_path), "--results", str(tmp_path / "results")]
    assert reproduce.main([str(ROOT / "experiments/fig1.yaml"), "--profile", "cpu", *given]) == 0
    assert (seen["data"], seen["results"]) == (str(tmp_path), tmp_path / "results/fig1/cpu")


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("no such host")

    monkeypatch.setattr("torchvision.datasets.Imagenette", unreachable)
    monkeypatch.setattr("pictures.ROOT", tmp_path)
    assert reproduce.main([str(ROOT / "experiments/fig1.yaml"), "--profile", "cpu", "--results", str(tmp_path / "results")]) == 2
    *announced, error = capsys.readouterr().err.strip().split("\n")
    assert error.startswith("error: cannot download Imagenette to ")
    assert "no such host" in error and error.endswith("or give a folder of your own pictures, --data FOLDER (make: DATA=FOLDER)")
    assert announced[0].startswith("fig1 cpu-imagenette: small models")
    assert "144 arms, 0 of them finished; about " in announced[1]
    assert announced[2].startswith("pictures: DATA=FOLDER")
    assert not (tmp_path / "results").exists()


def test_the_smoke_profile_says_what_it_does_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "run", lambda progress, runner, console: None)
    assert reproduce.main([str(ROOT / "experiments/fig1.yaml"), "--profile", "smoke", "--jobs", "2", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().err
    assert "30 arms, 0 of them finished; about 9.1 min, 2 at a time\npictures: photographs" in text
    assert "make reproduce-fig1 PROFILE=cpu" in text

"""Ablations: from a spec to tables and figures, once for real at a small scale, and from results that are made up."""

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import ablations
import reproduce
from arms import ROOT, arms, choose, layered, read
from details import SERIES
from running import finished, write_json

SPEC = read(ROOT / "experiments/ablations.yaml")
TRAINED = "gq-16-16-256-0.5-1.01-reference-0.1"


def photographs(folder: Path) -> None:
    """Squares of photographs that come with scikit-image, in train/ and val/."""
    for split, name in (("train", "astronaut.png"), ("val", "coffee.png")):
        (folder / split).mkdir(parents=True)
        with as_file(files("skimage").joinpath("data", name)) as path, Image.open(path) as picture:
            for i in range(16):
                left, top = 64 * (i % 4), 64 * (i // 4)
                picture.convert("RGB").crop((left, top, left + 64, top + 64)).save(folder / split / f"{i}.png")


@pytest.mark.slow
def test_the_prior_weight_for_real(tmp_path: Path) -> None:
    """A VAE of 20 steps, converted again and measured, from the command line to a table, curves, trajectories and a histogram."""
    photographs(tmp_path / "pictures")
    small = {
        "axes": {"codebook_size": [256]},
        "extra": [],
        "overrides": {
            "model.loss": {"pixel": "l2", "lpips_weight": 0.0, "lpips_network": "alex"},
            "model.backbone.init_args.width": 32,
            "model.backbone.init_args.layers": 1,
            "data.init_args.batch_size": 8,
            "trainer.max_steps": 20,
            "trainer.log_every_n_steps": 5,
        },
    }
    profiles = {"train": layered(SPEC["profiles"]["train"], small)}
    another = {"axes": {"of": [TRAINED], "codebook_size": [256], "prior_weight": [0.0]}, "extra": []}
    profiles["convert"] = layered(SPEC["profiles"]["convert"], another)
    sections = [
        {"name": "prior", "title": "Prior", "rows": [{"label": "{prior_weight:g}", "convert": {}}], "columns": ["psnr", "lost"]},
        {
            "name": "moves",
            "title": "Moves",
            "rows": [{"label": "paper", "train": {}}],
            "columns": ["psnr"],
            "figure": {"kind": "trajectories"},
        },
        {"name": "bits", "title": "Bits", "rows": [{"label": "paper", "train": {}}], "columns": ["psnr"], "figure": {"kind": "histogram"}},
    ]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"sections": sections, "profiles": profiles}, sort_keys=False))
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    for profile in ("train", "convert"):
        call = [str(tmp_path / "tiny.yaml"), "--profile", profile, "--data", str(tmp_path / "pictures"), *folders]
        assert reproduce.main(call) == 0
    assert ablations.main([str(tmp_path / "tiny.yaml"), *folders]) == 0
    results = tmp_path / "results/tiny"
    trained = json.loads((results / f"train/{TRAINED}.json").read_text())
    moves = trained["details"]["trajectories"]
    assert {name: [step for step, _ in values] for name, values in moves.items()} == {name: [4, 9, 14, 19] for name in SERIES}
    bins = trained["details"]["bits_histogram"]
    assert sum(bins["counts"]) == trained["metrics"]["tokens"] == 16 * 16 * 2
    assert bins["first"] * bins["width"] <= trained["metrics"]["bits_min"] <= (bins["first"] + 1) * bins["width"]
    (converted,) = (results / "convert").glob("*.json")
    metrics = json.loads(converted.read_text())["metrics"]
    assert metrics["gaussian_psnr"] == pytest.approx(trained["metrics"]["gaussian_psnr"], abs=1e-3), "the same VAE"
    assert metrics["psnr"] != trained["metrics"]["psnr"], "another score"
    assert str(tmp_path / "pictures") not in converted.read_text()
    assert {path.name for path in results.iterdir() if path.is_file()} == {
        *("tiny.md", "moves.png", "moves.svg", "bits.png", "bits.svg"),
    }


def made_up(results: Path) -> None:
    """A result of every arm of the spec."""
    for profile in SPEC["profiles"]:
        for i, arm in enumerate(arms(choose(SPEC, profile), f"runs/{profile}")):
            names = ("lpips", "ssim", "bits_mean", "bits_std", "bits_min", "bits_max", "share_within_alpha", "codebook_usage")
            metrics = {"psnr": 20 + i / 8, "gaussian_psnr": 25.0} | dict.fromkeys(names, 0.5)
            moves = {f"{group}{name}": [[0, 1.0], [1, 2.0]] for group in ("tdc/lambda_", "bits/") for name in ("min", "mean", "max")}
            details = {"trajectories": moves, "bits_histogram": {"width": 0.1, "first": 10, "counts": [1, 0, 2]}}
            content: dict[str, Any] = {"arm": arm.values, "command": arm.line, "metrics": metrics, "details": details}
            write_json(results / profile / f"{arm.name}.json", content)


@pytest.mark.parametrize("profile", SPEC["profiles"])
def test_committed_results_are_those_of_the_spec(profile: str) -> None:
    results = ROOT / "experiments/results/ablations" / profile
    found = [arm.name for arm in arms(choose(SPEC, profile), f"runs/experiments/ablations/{profile}") if finished(arm, results)]
    assert sorted(found) == sorted(path.stem for path in results.glob("*.json"))


def test_every_section_finds_its_arms_and_is_drawn(tmp_path: Path) -> None:
    made_up(tmp_path)
    for section in SPEC["sections"]:
        rows = ablations.collect(SPEC, section, tmp_path, "runs")
        assert len(rows) >= 2, section["name"]
        assert "|  |" not in ablations.table(section, rows), section["name"]
        assert section["columns"], section["name"]
        drawn = ablations.FIGURES[section["figure"]["kind"]](section, ablations.collect(SPEC, section, tmp_path, "runs", "line"))
        assert all(axes.get_lines() for axes in drawn.axes), section["name"]
    seeds = next(section for section in SPEC["sections"] if section["name"] == "seeds")
    rows = ablations.collect(SPEC, seeds, tmp_path, "runs")
    assert {label: len(several) for label, several in rows.items()} == {"iid": 10, "sobol": 10}
    line = ablations.table(seeds, rows).splitlines()[2]
    values = [content["metrics"]["psnr"] for content in rows["iid"]]
    assert line.startswith(f"| iid | {sum(values) / 10:.3f} ({min(values):.3f} to {max(values):.3f}) |")


def test_colours_and_markers_suffice(tmp_path: Path) -> None:
    made_up(tmp_path)
    for section in SPEC["sections"]:
        if section["figure"]["kind"] == "trajectories":
            continue
        drawn = ablations.FIGURES[section["figure"]["kind"]](section, ablations.collect(SPEC, section, tmp_path, "runs", "line"))
        styles = [(line.get_color(), line.get_marker()) for line in drawn.axes[0].get_lines()]
        assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles), section["name"]


def test_what_is_not_finished_is_left_out(tmp_path: Path) -> None:
    assert ablations.main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "ablations/ablations.md").read_text() == "<!-- python experiments/ablations.py -->\n"

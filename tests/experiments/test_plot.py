"""Figures and tables from results that are made up here, beside the published ones."""

import copy
import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from PIL import Image

from arms import ROOT, Arm, arms, choose, read
from panels import BASELINES, METHOD, figure
from plot import draw, markdown
from points import points, published_points

PLOT = choose(read(ROOT / "experiments/fig1.yaml"), "cpu")["plot"]
LOOKS = {marker for _, marker in (*METHOD, *BASELINES)}
PUBLISHED = yaml.safe_load((ROOT / "experiments/published.yaml").read_text())


def content(backbone: str, quantizer: str, rate: float, seed: int = 0, **metrics: float) -> dict[str, Any]:
    values = {"psnr": 20 + 4 * rate + seed, "lpips": 0.2, "ssim": 0.7, "rfid": 100.0, "bits_per_pixel": rate} | metrics
    arm = {"backbone": backbone, "quantizer": quantizer, "bits_per_position": round(64 * rate), "seed": seed}
    return {"arm": arm, "metrics": values}


MEASURED = [
    *(content(backbone, quantizer, rate) for backbone in ("vit", "unet") for quantizer in ("gq", "fsq") for rate in (0.25, 0.5, 1.0)),
    *(content("vit", "gq", 0.25, seed) for seed in (1, 2)),
]


def test_seeds_become_a_mean_with_a_span() -> None:
    found = {(point.style, point.series, point.x): point for point in points(PLOT, MEASURED)}
    assert len(found) == 12
    assert found["vit", "gq", 0.25].values["psnr"] == (22, 21, 23)
    assert found["vit", "gq", 0.25].seeds == 3
    assert found["unet", "gq", 0.25].values["psnr"] == (21, 21, 21)


def test_published_numbers_are_complete() -> None:
    found = published_points(PLOT, PUBLISHED)
    axes = choose(read(ROOT / "experiments/fig1.yaml"), "paper")["axes"]
    wanted = {(b, q, rate / 64) for b in axes["backbone"] for q in axes["quantizer"] for rate in axes["bits_per_position"]}
    assert {(point.style, point.series, point.x) for point in found} == wanted
    assert all(set(point.values) == {"psnr", "lpips", "ssim", "rfid"} for point in found)
    # arXiv 2512.06609, ViT, 0.5 bits per pixel
    gq = next(point for point in found if (point.style, point.series, point.x) == ("vit", "gq", 0.5))
    assert [gq.values[name][0] for name in PLOT["y"]] == [30.42, 0.037, 0.882, 0.592]


def planned(**axes: list[Any]) -> list[Arm]:
    wanted = {"backbone": ["unet", "vit"], "quantizer": ["gq", "fsq"], "bits_per_position": [16, 32, 64], "seed": [0]} | axes
    return arms({"configs": [], "axes": wanted, "arguments": {}}, "runs")


def test_the_figure_has_what_the_spec_says() -> None:
    ours, theirs = points(PLOT, MEASURED), published_points(PLOT, PUBLISHED)
    drawn = figure(PLOT, planned(), ours, theirs)
    panels, lead = drawn.axes[:-1], drawn.axes[-1]
    assert [axes.get_title()[:-2] for axes in panels[:4]] == ["PSNR, dB", "LPIPS", "SSIM", "rFID"]
    assert [axes.get_yscale() for axes in panels] == ["linear", "linear", "linear", "log"] * 4
    assert [axes.get_ylabel() for axes in panels[::4]] == ["ViT, here", "UNet, here", "UNet, published", "ViT, published"]

    def drawn_in(axes: Axes) -> set[tuple[Any, str]]:
        return {(line.get_color(), str(line.get_marker())) for line in axes.get_lines() if line.get_marker() in LOOKS}

    assert [len(drawn_in(axes)) for axes in panels[::4]] == [2, 2, 5, 5]
    assert drawn_in(panels[0]) < drawn_in(panels[8]), "one method has one look in all rows"
    assert panels[0].get_ylim()[1] < panels[8].get_ylim()[1], "axes of their own"
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["GQ", "VQGAN", "FSQ", "LFQ", "BSQ"]
    assert {text.get_text() for text in panels[8].texts} == {"GQ", "VQGAN", "FSQ", "LFQ", "BSQ"}, "lines are named"
    heights = sorted(text.get_position()[1] for text in panels[8].texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.08
    bars = [bar.get_height() for bar in lead.patches]
    assert len(bars) == 12
    assert bars[9:] == pytest.approx([27.61 - 26.51, 30.17 - 29.29, 32.47 - 32.38]), "the published ones, on the UNet"


def test_what_was_not_measured_has_an_empty_panel() -> None:
    without = [content("vit", "gq", 0.25)]
    del without[0]["metrics"]["rfid"]
    drawn = figure(PLOT, planned(), points(PLOT, without), [])
    assert [text.get_text() for text in drawn.axes[3].texts] == ["not measured"]


def test_files_say_the_same_and_are_the_same_every_time(tmp_path: Path) -> None:
    first = draw(PLOT, planned(), MEASURED, tmp_path, "call")
    assert [path.name for path in first] == ["fig1.png", "fig1.svg", "fig1.csv", "fig1.md"]
    with Image.open(first[0]) as picture:
        assert picture.width > 2000
    before = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in draw(PLOT, planned(), copy.deepcopy(MEASURED), tmp_path, "call")] == before
    assert len(list(tmp_path.iterdir())) == 4
    rows = list(csv.DictReader(first[2].read_text().splitlines()))
    assert len(rows) == 12 + 30
    vit = next(
        row for row in rows if (row["source"], row["backbone"], row["quantizer"], row["bits_per_pixel"]) == ("here", "vit", "gq", "0.25")
    )
    assert [vit[name] for name in ("seeds", "psnr", "psnr_min", "psnr_max", "rfid")] == ["3", "22", "21", "23", "100"]


def test_a_metric_that_was_not_measured_is_left_out(tmp_path: Path) -> None:
    without = json.loads(json.dumps(MEASURED))
    for each in without:
        del each["metrics"]["ssim"]
    plot = PLOT | {"y": ["ssim", "rfid"]}
    rows = list(csv.DictReader(draw(plot, planned(), without, tmp_path, "call")[2].read_text().splitlines()))
    assert (rows[0]["ssim"], rows[0]["rfid"], rows[0]["rfid_max"]) == ("", "100", "100")


def test_the_table_has_ours_and_theirs() -> None:
    text = markdown(PLOT, points(PLOT, MEASURED), published_points(PLOT, PUBLISHED))
    head, _, *rows = text.strip().split("\n")
    assert head == "| at 0.25 / 0.5 / 1 bits per pixel | PSNR, dB ↑ | LPIPS ↓ | SSIM ↑ | rFID ↓ |"
    assert [row.split(" | ")[0] for row in rows] == ["| ViT GQ", "| ViT FSQ", "| UNet GQ", "| UNet FSQ"]
    assert "22.00 / 22.00 / 24.00<br>*27.88 / 30.42 / 31.71*" in rows[0]


@pytest.mark.parametrize("missing", [["published"], ["labels"], ["as_published"], ["method", "baselines"]])
def test_what_a_plot_may_leave_out(missing: list[str], tmp_path: Path) -> None:
    plot = {key: value for key, value in (PLOT | {"y": ["psnr"]}).items() if key not in missing}
    assert all(path.stat().st_size for path in draw(plot, planned(), MEASURED, tmp_path, "call"))

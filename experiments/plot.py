"""Figures, tables and a verdict, from the JSON files of arms and from published numbers.

    plot:
      x: bits_per_pixel            a metric
      y: [psnr, lpips, ssim, rfid] metrics, one panel each
      series: quantizer            an axis: its colour and marker
      style: backbone              an axis: a row of panels for each of its values
      published: FILE              numbers to show in rows of their own
      labels: {gq: GQ}             what to call axes' values

A metric's label, format, direction and kind of axis are its own, see gq_lightning/metrics. A plot that says who wins, see verdict.py, has

      method: [gq, gq_wide]        series of the method: strong colours
      as_published: gq             that of them which has the published form, to be compared by itself as well
      baselines: [vq, fsq]         series to compare it with: pale colours
      lead: psnr                   the metric whose lead is shown at every point
      rate: bits_per_position      the axis behind x

Points of one series, style and x are runs with different seeds: the mean is drawn, with a bar from the smallest to the largest.
"""

import csv
from pathlib import Path
from typing import Any

import yaml

import verdict
from arms import ROOT, Arm
from looks import save
from panels import figure
from points import Plot, Point, label, number, points, published_points


def draw(plot: Plot, planned: list[Arm], measured: list[dict[str, Any]], folder: Path, call: str) -> list[Path]:
    """Writes NAME.png, NAME.svg, NAME.csv and NAME.md, NAME being that of the experiment; returns their paths.

    Args:
        planned: all arms of the experiment, so that what is missing can be said.
        measured: contents of the JSON files of those that are finished.
    """
    published = yaml.safe_load((ROOT / plot["published"]).read_text()) if "published" in plot else {"series": []}
    ours, theirs = points(plot, measured), published_points(plot, published)
    paths = [folder / f"{plot['name']}.{suffix}" for suffix in ("png", "svg", "csv", "md")]
    save(figure(plot, planned, ours, theirs), paths[:2])
    with open(paths[2], "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows(plot, ours, theirs))
    texts = [f"<!-- {call} -->\n", markdown(plot, ours, theirs)]
    if "method" in plot:
        texts.insert(1, verdict.markdown(plot, planned, measured, ours, theirs))
    paths[3].write_text("\n".join(texts))
    return paths


def rows(plot: Plot, ours: list[Point], theirs: list[Point]) -> list[list[Any]]:
    """A line per point: who measured it, what it is, and per metric the mean, the smallest and the largest."""
    metrics = [f"{name}{suffix}" for name in plot["y"] for suffix in ("", "_min", "_max")]
    lines: list[list[Any]] = [["source", plot["style"], plot["series"], plot["x"], "seeds", *metrics]]
    for source, several in (("here", ours), ("published", theirs)):
        for point in several:
            numbers = [number for name in plot["y"] for number in point.values.get(name, ("", "", ""))]
            texts = [f"{number:.6g}" if isinstance(number, float) else number for number in numbers]
            lines.append([source, point.style, point.series, f"{point.x:g}", point.seeds, *texts])
    return lines


def markdown(plot: Plot, ours: list[Point], theirs: list[Point]) -> str:
    """A row per style and series; a cell has a metric at all rates, ours, and below it the published ones in italics."""
    keys = list(dict.fromkeys((point.style, point.series) for point in ours))
    rates = sorted({point.x for point in ours})
    head = [number(name).heading for name in plot["y"]]
    lines = [f"| at {' / '.join(f'{x:g}' for x in rates)} {label(plot, plot['x'])} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for style, series in keys:
        cells = []
        for name in plot["y"]:
            texts = []
            for several, form in ((ours, "{}"), (theirs, "*{}*")):
                mine = {
                    point.x: point.values[name][0]
                    for point in several
                    if (point.style, point.series) == (style, series) and name in point.values
                }
                if mine:
                    texts.append(form.format(" / ".join(number(name).show(mine[x]) if x in mine else "-" for x in rates)))
            cells.append("<br>".join(texts))
        lines.append(f"| {label(plot, style)} {label(plot, series)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

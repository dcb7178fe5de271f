"""Figures from the JSON files of arms and from published numbers.

    plot:
      x: bits_per_pixel            a metric
      y: [psnr, lpips, ssim, rfid] metrics, one panel each
      log: [rfid]                  panels whose axis is logarithmic
      series: quantizer            an axis: its colour and marker
      style: backbone              an axis: its line
      published: FILE              numbers to show beside ours, lighter
      labels: {gq: GQ}             what to call axes' values and metrics
      better: {psnr: up}           which way is better, an arrow beside the panel's name

Points of one series, style and x are runs with different seeds: the mean is drawn, with a bar from the smallest to the largest.
"""

import csv
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from arms import ROOT

# Okabe and Ito's palette, told apart with any colour vision; a marker each, told apart without colours
COLOURS = ("#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#0072B2", "#000000", "#F0E442")
MARKERS = "svD^oPX*"
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
ARROWS = {"up": " \u2191", "down": " \u2193"}
LIGHTER = 0.3


@dataclass(frozen=True)
class Point:
    """A mean over seeds: `values` by metric, each with the smallest and largest."""

    series: str
    style: str
    x: float
    seeds: int
    values: dict[str, tuple[float, float, float]]


def draw(plot: dict[str, Any], measured: list[dict[str, Any]], folder: Path, call: str) -> list[Path]:
    """Writes NAME.png, NAME.svg, NAME.csv and NAME.md, NAME being that of the experiment; returns their paths."""
    published = yaml.safe_load((ROOT / plot["published"]).read_text()) if "published" in plot else {"series": []}
    ours, theirs = points(plot, measured), published_points(plot, published)
    drawn = figure(plot, ours, theirs)
    paths = [folder / f"{plot['name']}.{suffix}" for suffix in ("png", "svg", "csv", "md")]
    save(drawn, paths[:2])
    with open(paths[2], "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows(plot, ours, theirs))
    paths[3].write_text(f"<!-- {call} -->\n\n{markdown(plot, ours, theirs)}")
    return paths


def save(drawn: Figure, paths: Iterable[Path]) -> None:
    """Writes a figure, PNG or SVG as the path says; the same numbers give the same file."""
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}):
            drawn.savefig(path.with_name(f".{path.name}"), dpi=200, bbox_inches="tight", metadata=metadata, format=path.suffix[1:])
        os.replace(path.with_name(f".{path.name}"), path)


def points(plot: dict[str, Any], measured: Iterable[dict[str, Any]]) -> list[Point]:
    """The measured points, in the order of the arms."""
    groups: dict[tuple[str, str, float], list[dict[str, float]]] = defaultdict(list)
    for content in measured:
        arm, metrics = content["arm"], content["metrics"]
        groups[arm[plot["series"]], arm[plot["style"]], metrics[plot["x"]]].append(metrics)
    found = []
    for (series, style, x), several in groups.items():
        values = {}
        for name in plot["y"]:
            if numbers := [metrics[name] for metrics in several if name in metrics]:
                mean, low, high = statistics.fmean(numbers), float(min(numbers)), float(max(numbers))
                # a mean of equal numbers may be rounded away from them
                values[name] = (min(max(mean, low), high), low, high)
        found.append(Point(series, style, x, len(several), values))
    return found


def published_points(plot: dict[str, Any], published: dict[str, Any]) -> list[Point]:
    """Each number of a published series lies over its own x."""
    found = []
    for series in published["series"]:
        for i, x in enumerate(published[plot["x"]]):
            values = {name: (float(series[name][i]),) * 3 for name in plot["y"] if name in series}
            found.append(Point(series[plot["series"]], series[plot["style"]], x, 1, values))
    return found


def figure(plot: dict[str, Any], ours: list[Point], theirs: list[Point]) -> Figure:
    """One panel per metric, the legend below them."""
    every = [*theirs, *ours]  # colours stay where some of ours are missing
    series, styles = (list(dict.fromkeys(getattr(point, name) for point in every)) for name in ("series", "style"))
    drawn = Figure(figsize=(3.0 * len(plot["y"]), 3.3), layout="constrained")
    for name, axes in zip(plot["y"], drawn.subplots(1, len(plot["y"]), squeeze=False)[0], strict=True):
        for source, lighter in ((theirs, True), (ours, False)):
            _panel(axes, name, source, series, styles, lighter)
        axes.set_title(label(plot, name) + ARROWS.get(plot.get("better", {}).get(name, ""), ""), fontsize=10)
        axes.set_xlabel(label(plot, plot["x"]), fontsize=9)
        _ticks(axes, sorted({point.x for point in every}), name in plot.get("log", []))
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=label(plot, value))
        for value, colour, marker in zip(series, COLOURS, MARKERS, strict=False)
    ]
    handles += [Line2D([], [], color="black", linestyle=line, label=label(plot, value)) for value, line in zip(styles, LINES, strict=False)]
    if ours and theirs:
        handles += [
            Line2D([], [], color="black", marker="o", linestyle="none", label="here"),
            Line2D([], [], color="black", marker="o", linestyle="none", alpha=LIGHTER, label="published"),
        ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, handletextpad=0.4)
    return drawn


def rows(plot: dict[str, Any], ours: list[Point], theirs: list[Point]) -> list[list[Any]]:
    """A line per point: who measured it, what it is, and per metric the mean, the smallest and the largest."""
    metrics = [f"{name}{suffix}" for name in plot["y"] for suffix in ("", "_min", "_max")]
    lines: list[list[Any]] = [["source", plot["style"], plot["series"], plot["x"], "seeds", *metrics]]
    for source, several in (("here", ours), ("published", theirs)):
        for point in several:
            numbers = [number for name in plot["y"] for number in point.values.get(name, ("", "", ""))]
            texts = [f"{number:.6g}" if isinstance(number, float) else number for number in numbers]
            lines.append([source, point.style, point.series, f"{point.x:g}", point.seeds, *texts])
    return lines


def markdown(plot: dict[str, Any], ours: list[Point], theirs: list[Point]) -> str:
    """A row per style and series; a cell has a metric at all rates, ours, and below it the published ones in italics."""
    keys = list(dict.fromkeys((point.style, point.series) for point in ours))
    rates = " / ".join(f"{x:g}" for x in sorted({point.x for point in ours}))
    head = [label(plot, name) + ARROWS.get(plot.get("better", {}).get(name, ""), "") for name in plot["y"]]
    lines = [f"| at {rates} {label(plot, plot['x'])} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for style, series in keys:
        cells = []
        for name in plot["y"]:
            texts = []
            for several, form in ((ours, "{}"), (theirs, "*{}*")):
                mine = [point for point in several if (point.style, point.series) == (style, series) and name in point.values]
                if mine:
                    numbers = [f"{point.values[name][0]:.3g}" for point in sorted(mine, key=lambda point: point.x)]
                    texts.append(form.format(" / ".join(numbers)))
            cells.append("<br>".join(texts))
        lines.append(f"| {label(plot, style)} {label(plot, series)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(plot: dict[str, Any], value: str) -> str:
    return plot.get("labels", {}).get(value, value)


def _panel(axes: Axes, name: str, source: list[Point], series: list[str], styles: list[str], lighter: bool) -> None:
    for i, colour_of in enumerate(series):
        for j, line_of in enumerate(styles):
            mine = [point for point in source if (point.series, point.style) == (colour_of, line_of) and name in point.values]
            mine.sort(key=lambda point: point.x)
            if not mine:
                continue
            mean, low, high = zip(*(point.values[name] for point in mine), strict=True)
            bars = [[m - at for m, at in zip(mean, low, strict=True)], [at - m for m, at in zip(mean, high, strict=True)]]
            axes.errorbar(
                [point.x for point in mine],
                mean,
                yerr=bars if any(point.seeds > 1 for point in mine) else None,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[j % len(LINES)],
                linewidth=1.0 if lighter else 1.5,
                markersize=4 if lighter else 5.5,
                alpha=LIGHTER if lighter else 1.0,
                capsize=2.5,
            )


def plain(axes: Axes) -> None:
    """The look of all figures: a faint grid, no frame."""
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(axes: Axes, xs: list[float], logarithmic: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain(axes)

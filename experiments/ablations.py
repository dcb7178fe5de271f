"""Tables and figures of the ablations, from the JSON files of their arms.

    python experiments/ablations.py [SPEC]    writes ablations.md, and NAME.png and NAME.svg of every section, beside them

The spec's `sections` define the content:

    name, title:  of the section; the name is that of its figure
    rows:         [{label: text, PROFILE: {axis: [values]}}]; the arms of a profile that `extra` would name so. "{axis}" in the label is the
                  arm's; arms with one label become one row, of their mean, smallest and largest value
    columns:      metrics; `lost` is the PSNR that quantising costs
    figure:       {kind: histogram} of bits per token, a line per row
                  {kind: trajectories} of multipliers and bits, a column per row
                  {kind: points, x: axis, y: [metrics], log: 2} over an axis, a line per label, or per `line` of the rows where they have
                  one; without x, over the labels
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arms import ROOT, Spec, SpecError, arms, choose, read
from looks import COLOURS, LINES, MARKERS, plain, save
from points import label as label_of
from running import finished

Content = dict[str, Any]
Rows = dict[str, list[Content]]
LABELS = {"codebook_size": "codewords", "prior_weight": "weight of the prior", "alpha": "alpha, bits"}


def collect(spec: Spec, section: dict[str, Any], results: Path, runs: str, key: str = "label") -> Rows:
    """The finished arms of a section, by label or by line; `results` and `runs` hold a folder of each profile."""
    found: Rows = defaultdict(list)
    for row in section["rows"]:
        for profile, grid in row.items():
            if profile in ("label", "line"):
                continue
            chosen = choose(spec, profile)
            for arm in arms(chosen | {"axes": chosen["axes"] | grid, "extra": []}, f"{runs}/{profile}"):
                if (content := finished(arm, results / profile)) is not None:
                    found[row.get(key, row["label"]).format(**arm.values)].append(content)
    return dict(found)


def title(name: str) -> str:
    return label_of({"labels": LABELS}, name)


def metric(content: Content, name: str) -> float:
    metrics = content["metrics"]
    if name == "lost":
        return metrics["gaussian_psnr"] - metrics["psnr"]
    return metrics.get(name, math.nan)


def table(section: dict[str, Any], rows: Rows) -> str:
    columns = section["columns"]
    lines = [f"| | {' | '.join(title(name) for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for label, several in rows.items():
        cells = []
        for name in columns:
            values = [metric(content, name) for content in several]
            mean = number(name, statistics.fmean(values))
            cells.append(mean if len(values) == 1 else f"{mean} ({number(name, min(values))} to {number(name, max(values))})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(name: str, value: float) -> str:
    """Decibels with three decimals, because codebooks differ that little; other values with four digits."""
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if name == "lost" or name.endswith("psnr") else f"{value:.4g}"


def histogram(section: dict[str, Any], rows: Rows) -> Figure:
    drawn = Figure(figsize=(6, 3.3), layout="constrained")
    axes = drawn.subplots()
    for i, (label, (content, *_)) in enumerate(rows.items()):
        bins = content["details"]["bits_histogram"]
        middles = [(bins["first"] + j + 0.5) * bins["width"] for j in range(len(bins["counts"]))]
        shares = [count / sum(bins["counts"]) / bins["width"] for count in bins["counts"]]
        style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i % len(LINES)], "markersize": 4, "linewidth": 1.2}
        axes.plot(middles, shares, label=f"{label}: {number('lost', metric(content, 'lost'))} dB lost", markevery=4, **style)
    axes.set_yscale("log")
    _name(axes, "bits per token", "density per bit")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def trajectories(section: dict[str, Any], rows: Rows) -> Figure:
    drawn = Figure(figsize=(3.4 * len(rows), 5), layout="constrained")
    panels = drawn.subplots(2, len(rows), squeeze=False, sharey="row", sharex=True)
    for j, (label, (content, *_)) in enumerate(rows.items()):
        for axes, group in zip(panels[:, j], ("tdc/lambda_", "bits/"), strict=True):
            for i, part in enumerate(("min", "mean", "max")):
                steps, values = zip(*content["details"]["trajectories"][group + part], strict=True)
                style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i], "markersize": 3.5, "linewidth": 1.2}
                axes.plot(steps, values, label=part, markevery=3, **style)
        panels[0, j].set_title(label, fontsize=10)
        panels[0, j].set_yscale("log")
        _name(panels[0, j], "", "multiplier" if j == 0 else "")
        _name(panels[1, j], "step", "bits per token of a batch" if j == 0 else "")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return drawn


def points(section: dict[str, Any], rows: Rows) -> Figure:
    figure = section["figure"]
    x, ys = figure.get("x"), figure["y"]
    drawn = Figure(figsize=(max(3.0 * len(ys), 4.5), 3.0 if x else 0.6 + 0.35 * len(rows)), layout="constrained")
    for axes, y in zip(drawn.subplots(1, len(ys), squeeze=False, sharey=x is None)[0], ys, strict=True):
        for i, (label, several) in enumerate(rows.items()):
            values = [metric(content, y) for content in several]
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": label}
            if x is None:
                axes.plot(values, [label] * len(values), linestyle="none", **style)
                continue
            places = [content["arm"][x] for content in several]
            axes.plot(places, values, linestyle="none" if x == "seed" else LINES[i % len(LINES)], **style)
        if x is None:
            axes.margins(y=0.15)
            _name(axes, title(y), "")
        else:
            if "log" in figure:
                axes.set_xscale("log", base=figure["log"])
            _name(axes, title(x), title(y))
    if x is None:
        drawn.axes[0].invert_yaxis()
    elif len(rows) > 1:
        drawn.axes[0].legend(frameon=False, fontsize=8)
    return drawn


FIGURES: dict[str, Callable[[dict[str, Any], Rows], Figure]] = {"histogram": histogram, "trajectories": trajectories, "points": points}


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    plain(axes)


def show(spec: Path, results: Path, runs: str) -> str:
    """Draws every section with finished arms, and returns all tables."""
    content, texts = read(spec), ["<!-- python experiments/ablations.py -->\n"]
    for section in content["sections"]:
        if not (rows := collect(content, section, results, runs)):
            continue
        texts.append(f"## {section['title']}\n\n{table(section, rows)}")
        if "figure" in section:
            drawn = FIGURES[section["figure"]["kind"]](section, collect(content, section, results, runs, "line"))
            save(drawn, [results / f"{section['name']}.{suffix}" for suffix in ("png", "svg")])
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{spec.stem}.md").write_text("\n".join(texts))
    return "\n".join(texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and figures of ablations, from the JSON files of their arms.")
    parser.add_argument("spec", type=Path, nargs="?", default=ROOT / "experiments/ablations.yaml", help="YAML file with sections")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="folder of all results")
    parser.add_argument("--runs", default="runs/experiments", help="folder of all runs, as reproduce.py was told")
    options = parser.parse_args(arguments)
    try:
        print(show(options.spec, ROOT / options.results / options.spec.stem, f"{options.runs}/{options.spec.stem}"))
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

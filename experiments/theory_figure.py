"""Figure of the results of experiments/theory.py: the probability over t, and on a scale where doubly exponential decay is a line."""

import math
from itertools import zip_longest
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bounds import deviation_lower_bound, deviation_probability, deviation_upper_bound
from looks import COLOURS, MARKERS, plain

UPPER, LOWER, LIMIT = COLOURS[4], COLOURS[5], "0.55"
# the points of all means lie on one curve: nested markers, the largest first
SIZES = (7.5, 5.5, 4.0, 2.5)
Style = dict[str, Any]


def figure(points: list[dict[str, Any]], c1: float, c2: float) -> Figure:
    """Left Pr, right -ln Pr, both over t."""
    means = list(dict.fromkeys(point["mu"] for point in points))
    styles: dict[float, Style] = {
        mean: {"color": colour, "marker": marker, "markersize": size, "linestyle": "none"}
        for mean, colour, marker, size in zip(means, COLOURS, MARKERS, SIZES, strict=False)
    }
    drawn = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for axes, logarithmic in ((left, False), (right, True)):
        _lines(axes, points[0], c1, c2, logarithmic)
        for point in sorted(points, key=lambda point: means.index(point["mu"])):
            _point(axes, point, styles[point["mu"]], logarithmic)
        axes.set_xlabel("t = ln K \N{MINUS SIGN} R, nats", fontsize=9)
        axes.set_xlim(-10.8, 15.4)
        plain(axes)
    left.set_title("Pr{|nearest codeword \N{MINUS SIGN} μ| > \N{GREEK SMALL LETTER SIGMA}}", fontsize=10)
    left.set_ylim(-0.03, 1.05)
    right.set_title("\N{MINUS SIGN}ln Pr: doubly exponential decay is a line", fontsize=10)
    right.set_yscale("log")
    right.set_ylim(1e-5, 3e6)
    drawn.legend(handles=_handles(styles, c1, c2), loc="outside lower center", ncols=6, frameon=False, fontsize=8.5, handletextpad=0.5)
    return drawn


def _lines(axes: Axes, point: dict[str, Any], c1: float, c2: float, logarithmic: bool) -> None:
    """The paper's bounds, the sharp ones, wide and light because they hide each other, and the exact probability of a point's posterior."""
    t = torch.linspace(-10.8, 15.4, 1049, dtype=torch.float64)
    sharp = point["sigma"] * math.sqrt(1 + point["mu"] ** 2)
    for constant, style in ((0.0, {"linewidth": 5.0, "alpha": 0.3}), (c1, {"linewidth": 1.5, "linestyle": "--"})):
        # its logarithm by its formula, which does not underflow
        decay = math.sqrt(2 / math.pi) * torch.exp(t - constant - 0.5)
        axes.plot(t, decay if logarithmic else deviation_upper_bound(t, constant), color=UPPER, zorder=1, **style)
    for constant, style in ((sharp, {"linewidth": 5.0, "alpha": 0.3}), (c2, {"linewidth": 1.5, "linestyle": "-."})):
        bound = deviation_lower_bound(-t, constant)
        says, bound = t[bound > 0], bound[bound > 0]
        axes.plot(says, -bound.log() if logarithmic else bound, color=LOWER, zorder=1, **style)
    exact = deviation_probability(point["mu"], point["sigma"], torch.exp(t + point["R"]), log=True)
    axes.plot(t, -exact if logarithmic else exact.exp(), color="black", linewidth=1.0, zorder=1.5)


def _point(axes: Axes, point: dict[str, Any], style: Style, logarithmic: bool) -> None:
    """Hollow where order statistics stand for the search. On the logarithmic scale 0 and 1 are limits."""
    value, (low, high) = point["measured"], point["interval"]
    face = style["color"] if point["method"] == "search" else "white"
    if not logarithmic:
        axes.errorbar(point["t"], value, yerr=[[value - low], [high - value]], elinewidth=0.8, markerfacecolor=face, **style)
    elif 0 < value < 1:
        y = -math.log(value)
        axes.errorbar(point["t"], y, yerr=[[y + math.log(high)], [-math.log(low) - y]], elinewidth=0.8, markerfacecolor=face, **style)
    else:
        y = -math.log(high if value == 0 else low)
        axes.plot(point["t"], y, marker="$\\uparrow$" if value == 0 else "$\\downarrow$", color=LIMIT, markersize=7, linestyle="none")


def _handles(styles: dict[float, Style], c1: float, c2: float) -> list[Line2D]:
    points = [Line2D([], [], label=f"μ = {mean:g}", **{**style, "markersize": 6}) for mean, style in styles.items()]
    points += [
        Line2D([], [], color=LIMIT, marker="o", linestyle="none", markerfacecolor="white", label="by order statistics"),
        Line2D([], [], color=LIMIT, marker="$\\uparrow$", markersize=7, linestyle="none", label="95 % limit: all or no trials deviate"),
    ]
    sigma = "\N{GREEK SMALL LETTER SIGMA}"
    lines = [
        Line2D([], [], color="black", linewidth=1.0, label="exact"),
        Line2D([], [], color=UPPER, linestyle="--", label=f"upper, c₁ = {c1:g}"),
        Line2D([], [], color=UPPER, linewidth=5, alpha=0.3, label="upper, c₁ = 0"),
        Line2D([], [], color=LOWER, linestyle="-.", label=f"lower, c₂ = {c2:g}"),
        Line2D([], [], color=LOWER, linewidth=5, alpha=0.3, label=f"lower, c₂ = {sigma}√(1 + μ²)"),
    ]
    # a legend is filled by columns: points above, lines below
    return [handle for pair in zip_longest(points, lines) for handle in pair if handle is not None]

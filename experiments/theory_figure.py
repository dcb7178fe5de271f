"""Figure of what experiments/theory.py measured: the probability over t, and on the scale where doubly exponential decay is a line."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gq_lightning.theory import deviation_lower_bound, deviation_probability, deviation_upper_bound
from plot import COLOURS, MARKERS

PALETTE = {"upper": COLOURS[4], "lower": COLOURS[5], "exact": "black"}
RANGE = (1e-5, 3e6)


def figure(points: list[dict[str, Any]], c1: float, c2: float) -> Figure:
    """Left Pr, right -ln Pr, both over t."""
    means = list(dict.fromkeys(point["mu"] for point in points))
    colours = dict(zip(means, (COLOURS[i] for i in (0, 1, 2, 3)), strict=False))
    markers = dict(zip(means, MARKERS, strict=False))
    drawn = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for axes, logarithmic in ((left, False), (right, True)):
        _lines(axes, points, c1, c2, logarithmic)
        for point in points:
            _point(axes, point, colours[point["mu"]], markers[point["mu"]], logarithmic)
        axes.set_xlabel("t = ln K − R, nats", fontsize=9)  # noqa: RUF001
        axes.set_xlim(-10.6, 15.4)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("Pr{|nearest codeword − μ| > σ}", fontsize=10)  # noqa: RUF001
    left.set_ylim(-0.03, 1.05)
    right.set_title("−ln Pr: a line is doubly exponential decay", fontsize=10)  # noqa: RUF001
    right.set_yscale("log")
    right.set_ylim(*RANGE)
    drawn.legend(handles=_handles(means, colours, markers, c1, c2), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return drawn


def _lines(axes: Axes, points: list[dict[str, Any]], c1: float, c2: float, logarithmic: bool) -> None:
    t = torch.linspace(-10.6, 15.4, 1041, dtype=torch.float64)
    upper, lower = deviation_upper_bound(t, c1), deviation_lower_bound(-t, c2)
    first = points[0]
    exact = deviation_probability(first["mu"], first["sigma"], torch.exp(t + first["R"]), log=True)
    if logarithmic:
        # the bound's own logarithm, which does not underflow
        upper, exact, lower = -torch.log(-torch.log(upper)), -exact, -torch.log(lower)
        upper = math.sqrt(2 / math.pi) * torch.exp(t - c1 - 0.5)
    else:
        exact = exact.exp()
    axes.plot(t, upper, color=PALETTE["upper"], linestyle="--", linewidth=1.5)
    shown = deviation_lower_bound(-t, c2) > 0
    axes.plot(t[shown], lower[shown], color=PALETTE["lower"], linestyle="-.", linewidth=1.5)
    axes.plot(t, exact, color=PALETTE["exact"], linewidth=1.0, zorder=1)


def _point(axes: Axes, point: dict[str, Any], colour: str, marker: str, logarithmic: bool) -> None:
    """Hollow where order statistics stand for the search. On the logarithmic scale 0 and 1 are limits, and arrows."""
    value, (low, high) = point["measured"], point["interval"]
    style = {"color": colour, "markersize": 5, "linewidth": 0.8, "markeredgewidth": 0.9}
    style["markerfacecolor"] = colour if point["method"] == "search" else "white"
    if not logarithmic:
        axes.errorbar(point["t"], value, yerr=[[value - low], [high - value]], marker=marker, **style)
    elif 0 < value < 1:
        y = -math.log(value)
        axes.errorbar(point["t"], y, yerr=[[y + math.log(high)], [-math.log(low) - y]], marker=marker, **style)
    else:
        y = -math.log(high if value == 0 else low)
        axes.plot(point["t"], y, marker=r"$\uparrow$" if value == 0 else r"$\downarrow$", **{**style, "markersize": 6})


def _handles(means: list[float], colours: dict[float, str], markers: dict[float, str], c1: float, c2: float) -> list[Line2D]:
    measured = [Line2D([], [], color=colours[mean], marker=markers[mean], linestyle="none", label=f"μ = {mean:g}") for mean in means]
    lines = [
        Line2D([], [], color="black", linewidth=1.0, label="exact"),
        Line2D([], [], color=PALETTE["upper"], linestyle="--", label=f"upper bound, c₁ = {c1:.2f}"),
        Line2D([], [], color=PALETTE["lower"], linestyle="-.", label=f"lower bound, c₂ = {c2:.2f}"),
        Line2D([], [], color="grey", marker="o", linestyle="none", markerfacecolor="white", label="by order statistics"),
    ]
    return [handle for pair in zip(measured, lines, strict=True) for handle in pair]

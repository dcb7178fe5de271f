"""The figure of an experiment: a row of panels for each style, our results above the published ones, and the method's lead.

Each row has its own axes, because results of small models would be squeezed into a band next to those of large ones.
"""

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from arms import Arm
from looks import COLOURS, MARKERS, plain
from points import Plot, Point, label, number
from verdict import contests

# the method's series warm and strong, the baselines cool and pale: told apart with any colour vision, by lightness within either
METHOD = (("#D55E00", "o"), ("#F2A900", "D"), ("#7F1D1D", "*"), ("#B8860B", "P"))
BASELINES = (("#8A8FA3", "s"), ("#5FA8D3", "v"), ("#1F6F8B", "X"), ("#9C8AC2", "d"), ("#4FA38A", "^"), ("#B7B7B7", "p"))
LEADS = (
    ("#7F1D1D", "white"),
    ("#D55E00", "white"),
    ("#FFFFFF", "#D55E00"),
)  # face and hatch: the best, as published, the published numbers
PUBLISHED = "#F6F6F4"
GAP = 0.085  # of a panel's height, between two labels at the ends of lines
Style = dict[str, Any]


def figure(plot: Plot, planned: list[Arm], ours: list[Point], theirs: list[Point]) -> Figure:
    """A panel per metric and row, and a last row with the method's lead if the spec names a method."""
    looks = _looks(plot, [*ours, *theirs])
    rows = [(name, style, several) for name, several in (("here", ours), ("published", theirs)) for style in _styles(several)]
    leads = "method" in plot and contests(plot, planned, ours, theirs)
    columns, count = len(plot["y"]), len(rows) + bool(leads)
    drawn = Figure(figsize=(3.1 * columns, 2.15 * count + 0.5), layout="constrained")
    grid = drawn.add_gridspec(count, columns)
    for i, (source, style, several) in enumerate(rows):
        mine = [point for point in several if point.style == style]
        for j, metric in enumerate(plot["y"]):
            axes = drawn.add_subplot(grid[i, j])
            _panel(axes, plot, metric, mine, looks)
            if source == "published" and ours:
                axes.set_facecolor(PUBLISHED)
            if i == 0:
                axes.set_title(number(metric).heading, fontsize=10.5, fontweight="bold")
            if i == len(rows) - 1:
                axes.set_xlabel(label(plot, plot["x"]), fontsize=9)
            if j == 0:
                axes.set_ylabel(f"{label(plot, style)}, {source}", fontsize=10.5, fontweight="bold")
    if leads:
        _leads(drawn.add_subplot(grid[-1, :]), plot, leads)
    handles = [Line2D([], [], label=label(plot, series), **_line(looks[series])) for series in looks]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, handletextpad=0.5)
    return drawn


def _styles(several: Iterable[Point]) -> list[str]:
    return list(dict.fromkeys(point.style for point in several))


def _looks(plot: Plot, every: list[Point]) -> dict[str, Style]:
    """By series, those of the method first. One series looks the same in all figures of a spec, whatever has been measured."""
    there = {point.series for point in every}
    known = [(series, pair, True) for series, pair in zip(plot.get("method", []), METHOD, strict=False)]
    known += [(series, pair, False) for series, pair in zip(plot.get("baselines", []), BASELINES, strict=False)]
    named = {series for series, _, _ in known}
    others = [series for series in dict.fromkeys(point.series for point in every) if series not in named]
    known += [(series, pair, not named) for series, pair in zip(others, zip(COLOURS, MARKERS, strict=True), strict=False)]
    return {series: {"color": colour, "marker": marker, "strong": strong} for series, (colour, marker), strong in known if series in there}


def _line(look: Style) -> Style:
    strong, marker = look["strong"], look["marker"]
    size = (9.0 if marker == "*" else 5.5) if strong else 5.0
    style = {"color": look["color"], "marker": marker, "linewidth": 1.7 if strong else 1.1, "markersize": size}
    return style | {"zorder": 3 if strong else 2, "markeredgecolor": "white", "markeredgewidth": 0.5 if strong else 0.0}


def _panel(axes: Axes, plot: Plot, metric: str, mine: list[Point], looks: dict[str, Style]) -> None:
    ends: list[tuple[float, str, Style]] = []
    for series in reversed(looks):  # the method lies over the others
        there = sorted((point for point in mine if point.series == series and metric in point.values), key=lambda point: point.x)
        if not there:
            continue
        mean, low, high = zip(*(point.values[metric] for point in there), strict=True)
        bars = [[m - at for m, at in zip(mean, low, strict=True)], [at - m for m, at in zip(mean, high, strict=True)]]
        seeds = any(point.seeds > 1 for point in there)
        axes.errorbar([point.x for point in there], mean, yerr=bars if seeds else None, capsize=2.5, elinewidth=1.0, **_line(looks[series]))
        ends.append((mean[-1], label(plot, series), looks[series]))
    _ticks(axes, sorted({point.x for point in mine}), number(metric).logarithmic)
    if not ends:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.5", fontsize=9)
        axes.set_yticks([])
    else:
        _names(axes, ends)


def _names(axes: Axes, ends: list[tuple[float, str, Style]]) -> None:
    """The lines' names at their right ends, moved apart where they would overlap."""
    axes.get_ylim()  # brings the limits up to date, which the transformation does not
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = sorted(((to_axes.transform((1.0, value))[1], name, look) for value, name, look in ends), key=lambda end: end[0])
    for place, (_, name, look) in zip(_apart([height for height, _, _ in heights]), heights, strict=True):
        weight = "bold" if look["strong"] else "normal"
        axes.text(1.01, place, name, transform=axes.transAxes, color=look["color"], fontsize=7, va="center", fontweight=weight)


def _apart(heights: list[float]) -> list[float]:
    """Sorted heights, neighbours moved away from each other until `GAP` lies between them: groups around their mean, between 0 and 1."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _places(groups[-1])[0] - _places(groups[-2])[-1] < GAP:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in _places(group)]


def _places(group: list[float]) -> list[float]:
    length = GAP * (len(group) - 1)
    first = max(0.0, min(sum(group) / len(group) - length / 2, 1 - length))
    return [first + GAP * i for i in range(len(group))]


def _ticks(axes: Axes, xs: list[float], logarithmic: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 5 * low else MaxNLocator(5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plain(axes)


def _leads(axes: Axes, plot: Plot, several: dict[str, Any]) -> None:
    """Bars at each style and x, one for each contest."""
    metric, cells = plot["lead"], next(iter(several.values())).cells()
    # the published numbers look the same, whether one or two contests are ours
    ours = [name for name in several if name != "published numbers"]
    colours = dict(zip(ours, LEADS if len(ours) > 1 else LEADS[1:], strict=False)) | {"published numbers": LEADS[-1]}
    width = 0.8 / len(several)
    for i, (name, contest) in enumerate(several.items()):
        face, hatch = colours[name]
        for j, cell in enumerate(cells):
            place = j + (i - (len(several) - 1) / 2) * width
            if (lead := contest.lead(cell, metric)) is None:
                text = "" if cell not in contest.cells() else "?"
                axes.annotate(text, (place, 0), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color="0.5")
                continue
            style: Style = {"hatch": "////"} if name == "published numbers" else {}
            axes.bar(place, lead.value, width * 0.92, color=face, edgecolor=hatch, linewidth=0.8, zorder=2, **style)
            text, above = f"{lead.value:+.2f}".replace("-", "\N{MINUS SIGN}") + ("*" if lead.beyond_seeds else ""), lead.value >= 0
            offset = {"xytext": (0, 2 if above else -2), "textcoords": "offset points", "va": "bottom" if above else "top"}
            axes.annotate(text, (place, lead.value), ha="center", fontsize=7.5, **offset)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"{label(plot, style)}, {x:g} {label(plot, plot['x'])}" for style, x in cells])
    axes.set_ylabel(f"lead, {label(plot, metric)}", fontsize=10.5, fontweight="bold")
    axes.margins(y=0.2)
    plain(axes)
    axes.grid(visible=False, axis="x")
    patches = []
    for name in several:
        style = {"hatch": "////"} if name == "published numbers" else {}
        patches.append(Patch(facecolor=colours[name][0], edgecolor=colours[name][1], label=name, **style))
    title = "Lead over the best baseline (* worst seed above every seed of every baseline)"
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(patches), frameon=False, fontsize=8.5, borderpad=0)

"""Does the method win? Comparisons with the best baseline, counted, and its lead beside the spread of the seeds; from JSON files alone.

A comparison is one metric at one style and x. The mean over seeds of the best series of `method` stands against that of the best of
`baselines`. It is decided where every series that the experiment plans has been measured there, and undecided otherwise. A lead is beyond
the seeds where the method's worst seed is better than every seed of every baseline; one seed has no spread.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from arms import Arm
from points import Plot, Point, Spread, label, number

NAMED = 12  # missing arms, at most


@dataclass(frozen=True)
class Lead:
    """Of the best series of the method over the best baseline: `value` in the metric's unit, positive where the method is better.

    `beyond_seeds` is None where a series has one seed.
    """

    method: Point
    baseline: Point
    value: float
    beyond_seeds: bool | None


@dataclass(frozen=True)
class Contest:
    """Points of one source, ours or the published ones, and the series that are compared there."""

    plot: Plot
    points: list[Point]
    methods: list[str]
    baselines: list[str]

    def cells(self) -> list[tuple[str, float]]:
        """(style, x), sorted by x within the styles as they come."""
        styles = list(dict.fromkeys(point.style for point in self.points))
        return sorted({(point.style, point.x) for point in self.points}, key=lambda cell: (styles.index(cell[0]), cell[1]))

    def at(self, cell: tuple[str, float], metric: str) -> dict[str, Point]:
        found = {point.series: point for point in self.points if (point.style, point.x) == cell and metric in point.values}
        return {series: found[series] for series in (*self.methods, *self.baselines) if series in found}

    def missing(self, cell: tuple[str, float], metric: str) -> list[str]:
        return [series for series in (*self.methods, *self.baselines) if series not in self.at(cell, metric)]

    def lead(self, cell: tuple[str, float], metric: str) -> Lead | None:
        """None where a series is missing."""
        there, down = self.at(cell, metric), number(metric).better == "lower"
        if self.missing(cell, metric) or not (self.methods and self.baselines):
            return None

        def good(point: Point) -> Spread:
            """Mean, worst and best, larger being better."""
            mean, low, high = point.values[metric]
            return (-mean, -high, -low) if down else (mean, low, high)

        mine, others = ([there[series] for series in several] for several in (self.methods, self.baselines))
        method, baseline = (max(several, key=lambda point: good(point)[0]) for several in (mine, others))
        beyond = good(method)[1] > max(good(point)[2] for point in others)
        known = min(point.seeds for point in (method, *others)) > 1
        return Lead(method, baseline, good(method)[0] - good(baseline)[0], beyond if known else None)

    def wins(self, metric: str) -> tuple[int, int]:
        """(comparisons that the method wins, those that are decided)."""
        found = [lead for cell in self.cells() if (lead := self.lead(cell, metric)) is not None]
        return sum(lead.value > 0 for lead in found), len(found)


def contests(plot: Plot, planned: Iterable[Arm], ours: list[Point], theirs: list[Point]) -> dict[str, Contest]:
    """By what the figure and the table call them: the best of the method, the series as published, and the published numbers."""
    expected = {arm.values[plot["series"]] for arm in planned}
    methods, baselines = ([series for series in plot[kind] if series in expected] for kind in ("method", "baselines"))
    names = ", ".join(label(plot, series) for series in methods)
    found = {f"best of {names}" if len(methods) > 1 else names: Contest(plot, ours, methods, baselines)}
    if (one := plot.get("as_published")) in methods and len(methods) > 1:
        found[f"{label(plot, one)} alone"] = Contest(plot, ours, [one], baselines)
    there = {point.series for point in theirs}
    if theirs:
        known = ([series for series in plot[kind] if series in there] for kind in ("method", "baselines"))
        found["published numbers"] = Contest(plot, theirs, *known)
    return found


def markdown(plot: Plot, planned: list[Arm], measured: list[dict[str, Any]], ours: list[Point], theirs: list[Point]) -> str:
    """What was won, by how much, what tokens lose against their Gaussian VAE, and which arms are missing."""
    several = contests(plot, planned, ours, theirs)
    comparisons = len({(arm.values[plot["style"]], arm.values[plot["rate"]]) for arm in planned})
    parts = [_wins(plot, several, comparisons), _leads(plot, several), _tokens(plot, ours)]
    there = [content["arm"] for content in measured]
    if missing := [arm.name for arm in planned if arm.values not in there]:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        parts.append(f"{len(missing)} of {len(planned)} arms are missing: {', '.join(missing[:NAMED])}{more}.\n")
    return "\n".join(filter(None, parts))


def _wins(plot: Plot, several: dict[str, Contest], comparisons: int) -> str:
    rivals = ", ".join(label(plot, series) for series in next(iter(several.values())).baselines)
    lines = [_row(f"Comparisons won against the best of {rivals}", *(number(name).heading for name in plot["y"]), "all")]
    lines.append("|---" * (len(plot["y"]) + 2) + "|")
    for name, contest in several.items():
        each = len(contest.cells()) if name == "published numbers" else comparisons
        counted = [contest.wins(metric) for metric in plot["y"]]
        cells = [_count(*pair, each) for pair in counted]
        total = _count(sum(won for won, _ in counted), sum(decided for _, decided in counted), each * len(counted))
        lines.append(_row(name, *cells, f"**{total}**"))
    return "\n".join(lines) + "\n"


def _count(won: int, decided: int, all_of_them: int) -> str:
    return f"{won} of {all_of_them}" + (f", {all_of_them - decided} undecided" if decided < all_of_them else "")


def _leads(plot: Plot, several: dict[str, Contest]) -> str:
    metric, cells = plot["lead"], next(iter(several.values())).cells()
    lines = [_row(f"Lead in {label(plot, metric)} at {label(plot, plot['x'])}", *several), "|---" * (len(several) + 1) + "|"]
    lines += [
        _row(f"{label(plot, style)}, {x:g}", *(_lead(contest, (style, x), metric) for contest in several.values())) for style, x in cells
    ]
    text = "Beyond the seeds: the method's worst seed is better than every seed of every baseline."
    return "\n".join(lines) + f"\n\n{text}\n"


def _lead(contest: Contest, cell: tuple[str, float], metric: str) -> str:
    if cell not in contest.cells():
        return ""
    if (found := contest.lead(cell, metric)) is None:
        return f"undecided: no {', '.join(label(contest.plot, series) for series in contest.missing(cell, metric))}"
    seeds = {True: ", beyond the seeds", False: ", within the seeds", None: ""}[found.beyond_seeds]
    names = (label(contest.plot, point.series) for point in (found.method, found.baseline))
    return f"**{found.value:+.2f}**{seeds} ({' over '.join(names)})".replace("-", "\N{MINUS SIGN}")


def _tokens(plot: Plot, ours: list[Point]) -> str:
    columns = [number("lost"), number("share_within_alpha")]
    lines = [_row("", *(column.label for column in columns)), "|---" * (len(columns) + 1) + "|"]
    for point in ours:
        if any(column.name in point.values for column in columns):
            cells = [_spread(point.values.get(column.name), column.show) for column in columns]
            lines.append(_row(f"{label(plot, point.style)} {label(plot, point.series)}, {point.x:g}", *cells))
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _spread(value: Spread | None, form: Callable[[float], str]) -> str:
    if value is None:
        return ""
    mean, low, high = (form(number) for number in value)
    return mean if low == high else f"{mean} ({low} to {high})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"

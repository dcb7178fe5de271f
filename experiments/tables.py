"""Results as text tables."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from arms import Arm
from points import number, spread

Content = dict[str, Any]
Values = dict[str, Any]


def markdown(table: dict[str, Any], measured: list[Content]) -> str:
    """A row per arm, named by the axis `rows`; the metrics that `columns` name, empty where an arm has none."""
    rows, columns = table["rows"], table["columns"]
    lines = [f"| {rows} | {' | '.join(number(column).heading for column in columns)} |", "|" + "---|" * (len(columns) + 1)]
    for content in measured:
        metrics = content["metrics"]
        cells = [number(column).show(metrics[column]) if column in metrics else "" for column in columns]
        lines.append(f"| {content['arm'][rows]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Choice:
    """What a sweep says of one group of arms.

    Attributes:
        when: the group, {axis: value}.
        best: {axis: value} of the axes that were searched and that the group has.
        tried: all values that were measured, with their scores, means over whatever else was varied.
    """

    when: Values
    best: Values
    tried: list[tuple[Values, float]]

    def edges(self) -> list[str]:
        """Axes of numbers whose best value is the smallest or the largest that was tried."""
        found = []
        for axis, value in self.best.items():
            values = {tried[axis] for tried, _ in self.tried}
            if not isinstance(value, (bool, str)) and len(values) > 1 and value in (min(values), max(values)):
                found.append(axis)
        return found


def choices(search: dict[str, Any], measured: Iterable[Content]) -> list[Choice]:
    """For each group of arms the values that make `metric` best.

    Args:
        search: `of`, {axis: the argument it is for}; `by`, the axes that make the groups; and `metric`, whose direction counts.
        measured: contents of the arms' files. What is not a number loses.
    """
    sign = -1 if number(search["metric"]).better == "lower" else 1
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for content in measured:
        arm, score = content["arm"], content["metrics"][search["metric"]]
        groups[tuple(arm[axis] for axis in search["by"])][tuple(arm[axis] for axis in search["of"])].append(score)
    found = []
    for key, scores in groups.items():
        tried = [(_named(search["of"], values), spread(several)[0]) for values, several in scores.items()]
        best, _ = max(tried, key=lambda pair: -math.inf if math.isnan(pair[1]) else sign * pair[1])
        found.append(Choice(_named(search["by"], key), best, tried))
    return found


def rules(search: dict[str, Any], measured: list[Content], planned: list[Arm]) -> str:
    """The rules of a spec that give every group its best values, to be pasted, and what was measured for each."""
    lines = []
    for choice in choices(search, measured):
        condition = ", ".join(f"{axis}: {wanted}" for axis, wanted in choice.when.items())
        setting = ", ".join(f"{search['of'][axis]}: {_plain(value)}" for axis, value in choice.best.items())
        notes = [", ".join(f"{' '.join(_plain(value) for value in values.values())}: {score:.2f}" for values, score in choice.tried)]
        notes += [f"at the edge: extend the sweep of {axis}" for axis in choice.edges()]
        wanted = [
            _named(search["of"], tuple(arm.values[axis] for axis in search["of"]))
            for arm in planned
            if choice.when.items() <= arm.values.items()
        ]
        measured_values = [values for values, _ in choice.tried]
        if missing := sum(values not in measured_values for values in wanted):
            notes.append(f"{missing} of {len(wanted)} arms are missing")
        lines.append(f"- {{when: {{{condition}}}, set: {{{setting}}}}}  # {'; '.join(notes)}")
    return "\n".join(lines) + "\n"


def _named(axes: Iterable[str], values: tuple[Any, ...]) -> Values:
    return {axis: value for axis, value in zip(axes, values, strict=True) if value is not None}


def _plain(value: Any) -> str:
    """As YAML reads it back, which takes 5e-05 for a text."""
    return yaml.safe_dump(value).splitlines()[0]

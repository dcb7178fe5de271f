"""What was measured, as text."""

from typing import Any

Content = dict[str, Any]


def markdown(table: dict[str, Any], measured: list[Content]) -> str:
    """A row per arm, named by the axis `rows`; the metrics that `columns` name, empty where an arm has none."""
    rows, columns = table["rows"], table["columns"]
    lines = [f"| {rows} | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for content in measured:
        metrics = content["metrics"]
        cells = [f"{metrics[column]:.4g}" if column in metrics else "" for column in columns]
        lines.append(f"| {content['arm'][rows]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def best(search: dict[str, Any], measured: list[Content]) -> list[tuple[dict[str, Any], Any]]:
    """For each group of arms the value of the axis `of` whose `metric` is largest: (group's values, best value).

    Args:
        search: `of`, an axis; `by`, the axes that make the groups; `metric`, larger is better; `sets`, the argument it is for.
        measured: contents of the arms' files.
    """
    groups: dict[tuple[Any, ...], list[Content]] = {}
    for content in measured:
        groups.setdefault(tuple(content["arm"][axis] for axis in search["by"]), []).append(content)
    winners = {key: max(contents, key=lambda content: content["metrics"][search["metric"]]) for key, contents in groups.items()}
    return [(dict(zip(search["by"], key, strict=True)), winner["arm"][search["of"]]) for key, winner in winners.items()]


def rules(search: dict[str, Any], measured: list[Content]) -> str:
    """The rules of a spec that give every group its best value, and what was measured for each value."""
    lines = []
    for when, value in best(search, measured):
        group = [content for content in measured if all(content["arm"][axis] == wanted for axis, wanted in when.items())]
        tried = ", ".join(f"{content['arm'][search['of']]:g}: {content['metrics'][search['metric']]:.2f}" for content in group)
        condition = ", ".join(f"{axis}: {wanted}" for axis, wanted in when.items())
        lines.append(f"- {{when: {{{condition}}}, set: {{{search['sets']}: {value}}}}}  # {tried}")
    return "\n".join(lines) + "\n"

"""Specs and arms: an experiment is data, and each of its arms is an ordinary command.

    spec (YAML) --layered--> with a profile, perhaps with its sweep --arms--> names, values and commands

A spec has

    configs:    files that every arm begins with
    axes:       {axis: [values]}; the arms are all combinations
    only:       {axis: {other axis: value or [values]}}; elsewhere an arm has no such axis: its value is null, and in no name
    order:      [axis]; arms are sorted by these axes first: with [seed], the first seed of everything comes before the second of anything
    extra:      more combinations, [{axis: [values]}]; an axis that is not named keeps its values
    arguments:  {axis: "--what {} adds to the command"}; an axis may have none and serve rules alone
    overrides:  {key: value} for all arms
    rules:      [{when: {axis: value or [values]}, set: {key: value}}], in order, over the overrides; "{axis}" in a value is the arm's
    command:    "python …", where an arm is not a `fit` of all that; "{axis}" is filled in, and "{folder}", that of its run, where it
                is to leave a metrics.json, and "{profiles}", the folder above, with the runs of all profiles
    pictures:   what the word DATA stands for and where to get it, in words
    without_data: what is downloaded where no folder of pictures is given, see pictures.py
    about, next: what reproduce.py says before the first arm and after the last one
    then:       ["python …"], commands that follow the first, likewise; a details.json that they leave gets into the arm's JSON
    jobs:       `cores` where every arm has one thread: as many arms at a time as there are cores, unless the call says how many
    cost:       what an arm takes before any was measured, see estimates.py
    table, plot: what to show, see reproduce.py and plot.py
    profiles:   {name: layer}; a layer is a spec whose mappings are merged with, whose configs and rules are appended to, and whose
                other entries replace those of the spec. A profile may be `like` another, a layer over that one's, and may have a
                `sweep`, one layer more.

The word DATA, at the start of a value, stands for the folder of the pictures, in commands that are written down as well.
"""

import functools
import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = "DATA"
Spec = dict[str, Any]
# what tables, figures and verdicts are drawn from
NEEDED: dict[str, tuple[str, ...]] = {"table": ("rows", "columns"), "plot": ("name", "x", "y", "series", "style")}
VERDICT = ("baselines", "lead", "rate")


class SpecError(Exception):
    """A wrong spec or option; the message is one line with the fix."""


@dataclass(frozen=True)
class Arm:
    """One combination of the axes' values.

    Attributes:
        name: of its files.
        values: by axis.
        settings: overrides and rules that apply, by key.
        command: from the project's folder, with DATA for the folder of the pictures.
        folder: of its run, relative to the project's folder.
        then: commands that follow, one after the other.
    """

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    command: list[str]
    folder: str
    then: tuple[list[str], ...] = ()

    @property
    def line(self) -> str:
        return self.with_data(DATA)

    def with_data(self, folder: str) -> str:
        """All commands as one line for a shell."""
        return " && ".join(shlex.join(with_data(word, folder) for word in command) for command in (self.command, *self.then))


def read(path: Path) -> Spec:
    if not path.is_file():
        raise SpecError(f"{path}: no such file; experiments/*.yaml are specs")
    try:
        spec = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise SpecError(f"{path}: no entries; experiments/arms.py describes them")
    return spec


def layered(spec: Spec, layer: Spec) -> Spec:
    """The spec merged with one layer."""
    merged = dict(spec)
    for key, value in layer.items():
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            merged[key] = before | value
        elif key in ("configs", "rules"):
            merged[key] = [*(before or []), *value]
        else:
            merged[key] = value
    return merged


def choose(spec: Spec, profile: str | None, sweep: bool = False) -> Spec:
    """The spec merged with one of its profiles, and with that profile's sweep.

    Raises:
        SpecError: there is no such profile or sweep, or the spec has profiles and none was named.
    """
    profiles = spec.get("profiles", {})
    if (profile is None) == bool(profiles) or (profile is not None and profile not in profiles):
        raise SpecError(
            f"--profile: give one of {', '.join(profiles)}" if profiles else "--profile: this experiment has none; leave it out"
        )
    plain = {key: value for key, value in spec.items() if key != "profiles"}
    layers: list[Spec] = []
    while profile is not None:
        if profile not in profiles:
            raise SpecError(f"profiles: one is like {profile}, which there is not; there are {', '.join(profiles)}")
        layers.append({key: value for key, value in profiles[profile].items() if key != "like"})
        profile = profiles[profile].get("like")
    chosen = functools.reduce(layered, reversed(layers), plain)
    layer = chosen.pop("sweep", None)
    if not sweep:
        return chosen
    if layer is None:
        raise SpecError("--sweep: this profile has none")
    return layered(chosen, layer)


def check(spec: Spec) -> None:
    """Refuses a spec whose results could not be shown, before hours are spent on its arms.

    Raises:
        SpecError: an entry is missing, or names an axis that is none.
    """
    for key in ("axes",) if "command" in spec else ("configs", "axes", "arguments"):
        if key not in spec:
            raise SpecError(f"{key}: the spec has none; experiments/arms.py describes it")
    for entry, keys in NEEDED.items():
        shown = spec.get(entry, {})
        keys += VERDICT if "method" in shown else ()
        if shown and (missing := [key for key in keys if key not in shown]):
            raise SpecError(f"{entry}: add {', '.join(missing)}, as in experiments/{'fig1' if entry == 'plot' else 'methods'}.yaml")
        for key in ("rows", "series", "style", "rate"):
            if key in shown and shown[key] not in spec["axes"]:
                raise SpecError(f"{entry}.{key}: {shown[key]} is no axis; there are {', '.join(spec['axes'])}")


def arms(spec: Spec, runs: str) -> list[Arm]:
    """The arms in the order of the axes, then those of `extra`, sorted by `order`, without duplicates."""
    found: dict[str, Arm] = {}
    for grid in ({}, *spec.get("extra", [])):
        if unknown := set(grid) - set(spec["axes"]):
            raise SpecError(f"extra: {', '.join(sorted(unknown))} is no axis; there are {', '.join(spec['axes'])}")
        axes = spec["axes"] | grid
        for combination in itertools.product(*axes.values()):
            arm = _arm(spec, _applicable(spec, dict(zip(axes, combination, strict=True))), runs)
            if found.setdefault(arm.name, arm).values != arm.values:
                raise SpecError(f"only: two arms are called {arm.name}; give the axes other values")
    ranks = [list(dict.fromkeys(arm.values[axis] for arm in found.values())) for axis in spec.get("order", [])]
    return sorted(
        found.values(), key=lambda arm: [rank.index(arm.values[axis]) for axis, rank in zip(spec.get("order", []), ranks, strict=True)]
    )


def matches(when: dict[str, Any], values: dict[str, Any], entry: str = "rules") -> bool:
    """Whether an arm's values are those that a rule asks for; `entry` names the rule's place in the spec.

    Raises:
        SpecError: the rule asks for an axis that is none.
    """
    if unknown := set(when) - set(values):
        raise SpecError(f"{entry}: {', '.join(sorted(unknown))} is no axis; there are {', '.join(values)}")
    return all(values[axis] in (wanted if isinstance(wanted, list) else [wanted]) for axis, wanted in when.items())


def with_data(text: str, folder: str) -> str:
    """Replaces DATA by the folder of the pictures."""
    return folder + text.removeprefix(DATA) if text == DATA or text.startswith(f"{DATA}/") else text


def without_data(content: Any, folder: str) -> Any:
    """The opposite, all through a nested content: files that others read name no folder of this machine."""
    if isinstance(content, dict):
        return {key: without_data(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [without_data(value, folder) for value in content]
    inside = isinstance(content, str) and (content == folder or content.startswith(f"{folder}/"))
    return DATA + content.removeprefix(folder) if inside else content


def _applicable(spec: Spec, values: dict[str, Any]) -> dict[str, Any]:
    """The values of this combination's axes; null for the others."""
    for axis, when in spec.get("only", {}).items():
        if axis in values and not matches(when, values, "only"):
            values = values | {axis: None}
    return values


def _arm(spec: Spec, values: dict[str, Any], runs: str) -> Arm:
    name = "-".join(str(value) for value in values.values() if value is not None)
    settings = dict(spec.get("overrides", {}))
    for rule in spec.get("rules", []):
        if matches(rule.get("when", {}), values):
            settings |= {key: _filled(value, values) for key, value in rule["set"].items()}
    folder = f"{runs}/{name}"
    texts = [*([spec["command"]] if "command" in spec else []), *spec.get("then", [])]
    commands = [[word.format(**values, folder=folder, profiles=Path(runs).parent) for word in shlex.split(text)] for text in texts]
    if "command" in spec:
        return Arm(name, values, settings, commands[0], folder, tuple(commands[1:]))
    command = ["python", "-m", "gq_lightning", "fit"]
    for config in spec["configs"]:
        command += ["--config", config]
    for axis, value in values.items():
        if value is not None:
            command += shlex.split(spec["arguments"].get(axis, "").format(_argument(value)))
    for key, value in settings.items():
        command += [f"--{key}", _argument(value)]
    command += ["--runs", runs, "--name", name, "--overwrite", "true"]
    return Arm(name, values, settings, command, folder, tuple(commands))


def _filled(value: Any, values: dict[str, Any]) -> Any:
    """Fills in '{axis}'; a value that is only '{axis}' becomes the axis' value with its type."""
    if not isinstance(value, str):
        return value
    alone = value.removeprefix("{").removesuffix("}")
    return values[alone] if value == f"{{{alone}}}" and alone in values else value.format(**values)


def _argument(value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

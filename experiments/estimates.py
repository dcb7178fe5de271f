"""Estimates the time of an arm from similar finished arms, or else from the spec's `cost`.

cost:
  by: [backbone, quantizer]                 axes; arms that share their values are alike, those that share the first ones if there are none
  seconds_per_step: {vit: 0.3, unet: 0.8}   by the first axis; measured once, and
  seconds_besides: {vit: 90, unet: 90}      start, evaluation and the like
or, where nobody has measured it,
  sustained_flops: 1.0e+14                   per second and device; a step is 3 times the backbone's forward pass per image
  images_per_step: 128                      on all devices together
  devices: 8
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from arms import ROOT, Arm, Spec, SpecError

Flops = Callable[[Arm], float]


def seconds(arm: Arm, cost: Spec, measured: list[dict[str, Any]], flops: Flops) -> float | None:
    """Wall-clock seconds of one arm, or None if nothing is known.

    Args:
        measured: contents of the finished arms' files. Those that were resumed took longer than they say.
        flops: of the forward pass of one image.
    """
    if not cost:
        return None
    by = [cost["by"]] if isinstance(cost["by"], str) else cost["by"]
    for count in range(len(by), 0, -1):
        axes = by[:count]
        alike = [content for content in measured if all(content["arm"][axis] == arm.values[axis] for axis in axes)]
        if taken := [content["seconds"] for content in alike if not content.get("resumed")]:
            return sum(taken) / len(taken)
    first = arm.values[by[0]]
    steps = arm.settings.get("trainer.max_steps", 0)  # what only measures takes none
    if "seconds_per_step" in cost:
        return steps * cost["seconds_per_step"][first] + cost["seconds_besides"][first]
    return 3 * flops(arm) * steps * cost["images_per_step"] / (cost["sustained_flops"] * cost["devices"])


def summarized() -> Flops:
    """The FLOPs from `gq_lightning summary`, once per backbone; the method changes them by less than 1 %."""
    known: dict[tuple[Any, ...], float] = {}

    def flops(arm: Arm) -> float:
        key = tuple(value for axis, value in arm.values.items() if axis not in ("quantizer", "bits_per_position", "seed"))
        if key not in known:
            command = [sys.executable, *arm.command[1:]]
            command[command.index("fit")] = "summary"
            done = subprocess.run([*command, "--format", "json"], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SpecError(f"{arm.name}: {done.stderr.strip()}")
            summary = json.loads(done.stdout)
            known[key] = summary["encode_flops"] + summary["decode_flops"]
        return known[key]

    return flops


def spoken(duration: float | None) -> str:
    """42 s, 4.5 min, 3.2 h or 12 d."""
    if duration is None:
        return "?"
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 100)):
        if duration < most * length:
            return f"{duration / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{duration / 86400:.0f} d"

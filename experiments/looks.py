"""The common style of all figures: colours, markers, lines, frame, and saving."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gq_lightning.files import whole_file

# Okabe and Ito's palette, told apart with any colour vision; a marker each, told apart without colours
COLOURS = ("#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#0072B2", "#000000", "#F0E442")
MARKERS = "svD^oPX*"
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")


def plain(axes: Axes) -> None:
    """Applies the common style: a faint grid, no frame."""
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def save(drawn: Figure, paths: Iterable[Path]) -> None:
    """Writes a figure, PNG or SVG as the path says; the same numbers give the same file."""
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}), whole_file(path) as file:
            drawn.savefig(file, dpi=200, bbox_inches="tight", metadata=metadata, format=path.suffix[1:])

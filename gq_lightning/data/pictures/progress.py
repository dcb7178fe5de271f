"""Progress of a long task, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gq_lightning.errors import printable

EVERY = 10  # seconds between two lines if standard error is not a terminal


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items just completed. Shows a bar on a terminal, else a line every few seconds."""
    console, done, said = Console(stderr=True, markup=False, emoji=False), 0, time.monotonic()
    title_column = TextColumn("{task.description}", markup=False)  # a path may contain brackets
    columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(printable(title), total=total)

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        bar.advance(task, more)
        if not console.is_terminal and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            print(f"{printable(title)}: {done}{'' if total is None else f' of {total}'}", file=sys.stderr, flush=True)

    with bar:
        yield advance

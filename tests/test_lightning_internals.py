"""Lightning's internals: all that are touched are there, and they are touched in one file."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn

import gq_lightning.cli.training  # noqa: F401 - imports every class that has one of Lightning's as its base
from gq_lightning.lightning_internals import ProgressBar, Unprofiled, profile_nothing

PACKAGE = Path(__file__).parents[1] / "gq_lightning"
ADAPTER = PACKAGE / "lightning_internals.py"
# the attributes used, by the class that has them
INTERNALS = {
    "Trainer": (
        "_accelerator_connector.cluster_environment",
        "_checkpoint_connector._restore_modules_and_callbacks",
        "_checkpoint_connector.restore_training_state",
        "_logger_connector.update_train_step_metrics",
        "_signal_connector.received_sigterm",
        "_signal_connector.register_signal_handlers",
        "fit_loop._data_fetcher",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop._broadcast_sigterm_tensor",
        "fit_loop.epoch_loop._should_check_val_fx",
        "fit_loop.epoch_loop.batch_progress.current",
        "fit_loop.epoch_progress.current",
        "fit_loop.epoch_progress.increment_completed",
        "fit_loop.epoch_progress.increment_processed",
        "fit_loop.reset_restart_stage",
        "fit_loop.restarted_mid_epoch",
        "profiler",
        "received_sigterm",
        "state.fn",
        "strategy.launcher",
    ),
    "DDPStrategy": ("cluster_environment",),
    "SubprocessLauncher": ("kill",),
    "LightningOptimizer": ("_on_after_step", "_on_before_step"),
    "LightningCLI": ("_get", "_parse_ckpt_path", "_parser"),
    "RichProgressBar": ("_get_train_description", "_stop_progress"),
}
# the progress entries used from a checkpoint
PROGRESS = {
    "epoch_loop.batch_progress": ("current.completed", "current.ready", "total.completed", "total.ready"),
    "epoch_loop.state_dict": ("_batches_that_stepped",),
    "epoch_progress": ("current.completed", "current.processed", "current.ready", "total.completed", "total.processed", "total.ready"),
}
# who may know of Lightning at all
ROOMS = {"data", "training", "priors", "callbacks", "cli", "lightning_internals"}
# what Lightning's API reference lists
DOCUMENTED = {
    "lightning.fabric.plugins.io",
    "lightning.pytorch",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli",
    "lightning.pytorch.core.optimizer",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins.environments",
    "lightning.pytorch.utilities",
    "lightning.pytorch.utilities.types",
}
# RunCommandLine asks LightningCLI for its settings by LightningCLI's own helper
INHERITED = {"RunCommandLine": {"_get"}, "CommandLine": {"_get"}, "SummaryCommand": {"_get"}}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != ADAPTER]


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def example(kind: str) -> Any:
    """An object of the kind, as small as can be."""
    return {
        "Trainer": trainer,
        "DDPStrategy": DDPStrategy,
        "SubprocessLauncher": lambda: _SubprocessScriptLauncher(LightningEnvironment(), 2, 1),
        "LightningOptimizer": lambda: LightningOptimizer(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)),
        "LightningCLI": lambda: LightningCLI,
        "RichProgressBar": RichProgressBar,
    }[kind]()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in INTERNALS.items() for name in names])
def test_it_is_still_there(kind: str, name: str) -> None:
    try:
        reduce(getattr, name.split("."), example(kind))
    except AttributeError as error:
        raise AssertionError(f"{kind}.{name} is gone from this version of Lightning ({error}): adapt lightning_internals.py") from error


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in PROGRESS.items() for name in names])
def test_a_checkpoint_tells_of_its_progress_as_before(part: str, name: str) -> None:
    try:
        reduce(dict.__getitem__, name.split("."), trainer().fit_loop.state_dict()[part])
    except KeyError as error:
        raise AssertionError(f"loops.fit_loop.{part}.{name} is gone from Lightning's checkpoints: adapt lightning_internals.py") from error


def test_the_table_is_what_the_adapter_touches() -> None:
    """Each private name in the adapter's functions is in the table, and each of the table's in the functions."""
    tree = ast.parse(ADAPTER.read_text())
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    listed = {part for names in INTERNALS.values() for name in names for part in name.split(".") if part.startswith("_")}
    assert touched == listed - {"_get", "_parse_ckpt_path"}, "which CommandLine calls, and a class here overrides"


def foreign(tree: ast.AST) -> set[str]:
    """Names of modules that a file imports from elsewhere than Lightning: `os._exit` is none of Lightning's."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.split(".")[0] != "lightning"
    }


def private_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """`x.y._z`, except of the object itself (`self._z`), which is another test's matter, and of foreign modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            inherited = isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super"
            if not own and not inherited and not (isinstance(root, ast.Name) and root.id in foreign(tree)):
                yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_others_use_what_is_documented(path: Path) -> None:
    tree, room = ast.parse(path.read_text()), path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    modules = {
        node.module: {alias.name for alias in node.names} for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    modules |= {alias.name: set() for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for module, names in modules.items():
        if module.split(".")[0] == "lightning":
            assert room in ROOMS, f"{path}: {room} may not import {module}"
            assert module in DOCUMENTED, f"{path}: {module} is not documented: import it in lightning_internals.py"
            assert not {name for name in names if name.startswith("_")}, f"{path}: {names} of {module}"
    if room in ROOMS:
        for node in private_attributes(tree):
            raise AssertionError(f"{path}:{node.lineno}: {ast.unparse(node)} belongs in lightning_internals.py")


def classes() -> list[tuple[type, tuple[type, ...]]]:
    """The package's classes that have bases in Lightning, each with these."""
    found = {}
    for path in FILES:
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"))
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                found[cls] = tuple(base for base in cls.__mro__ if base.__module__.split(".")[0] == "lightning")
    return [(cls, bases) for cls, bases in found.items() if bases]


def test_subclasses_leave_alone_what_is_private_to_their_bases() -> None:
    """They neither override nor call it, not even by `self`."""
    seen = classes()
    assert len(seen) > 20
    for cls, bases in seen:
        theirs = {name for base in bases for name in vars(base) if name.startswith("_") and not name.endswith("__")}
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(vars(cls))
        used -= {name for name in vars(cls) if name.startswith("_abc")}
        assert theirs & used - {"_abc_impl"} <= INHERITED.get(cls.__name__, set()), f"{cls.__qualname__}: {theirs & used}"


def test_hooks_go_unprofiled_unless_a_profiler_is_asked_for() -> None:
    plain, asked = trainer(), Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, profiler="simple")
    for each in (plain, asked):
        profile_nothing(each)
        with each.profiler.profile("a hook"):  # type: ignore[attr-defined]
            pass
    assert type(plain.profiler) is Unprofiled  # type: ignore[attr-defined]
    assert "a hook" in asked.profiler.recorded_durations  # type: ignore[attr-defined]


def test_the_bar_is_drawn_ten_times_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda bar, *arguments: drawn.append(arguments[-1]))
    bar = ProgressBar()
    for step in range(1, 26):
        monkeypatch.setattr("time.monotonic", lambda step=step: 100 + 0.03 * step)
        at = SimpleNamespace(is_last_batch=step == 10, global_step=step, max_steps=25)
        bar.on_train_batch_end(at, None, None, None, step - 1)  # type: ignore[arg-type]
    assert drawn == [0, 4, 8, 9, 13, 17, 21, 24]

"""Objects that remember the arguments they were built with, so that a tokenizer can be written down and rebuilt.

`describe` gives ``{"class_path": ..., "init_args": {...}}``, the form that LightningCLI's YAML files have, and `build` is
jsonargparse reading that form back: configs and saved tokenizers share one instantiation system.
"""

import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jsonargparse import ArgumentError, ArgumentParser

from gq_lightning.errors import UserError

T = TypeVar("T")


class Recorded:
    """Mixin that keeps the constructor's arguments, defaults included, in `init_args`.

    Attributes:
        training_arguments: names of those that shape the training alone: they have no part in `identity`.
        later_arguments: those that a version after the first one added, each with the value that means what versions before did. At that
            value it has no part in `identity`, so that a new argument leaves every earlier tokenizer what it was.
    """

    init_args: dict[str, Any]
    training_arguments: ClassVar[frozenset[str]] = frozenset()
    later_arguments: ClassVar[Mapping[str, Any]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        # bind_partial: copying and unpickling call __new__ without arguments, then restore __dict__
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        self.__dict__["init_args"] = dict(list(bound.arguments.items())[1:])
        return self

    def identity(self) -> dict[str, Any]:
        """Plain data, equal for two objects whose like arguments give the same tokens and pictures from the same weights."""
        arguments = {
            name: value.identity() if isinstance(value, Recorded) else describe(value)
            for name, value in self.init_args.items()
            if name not in self.training_arguments and not (name in self.later_arguments and value == self.later_arguments[name])
        }
        return {"class_path": public_path(type(self)), "init_args": arguments}


@runtime_checkable
class _HasInitArgs(Protocol):
    init_args: dict[str, Any]


def describe(value: Any) -> Any:
    """Plain data (JSON's types) from which `build` makes an equal object; recorded objects nest."""
    if isinstance(value, _HasInitArgs):
        cls = type(value)
        arguments = {name: describe(argument) for name, argument in value.init_args.items()}
        return {"class_path": public_path(cls), "init_args": arguments}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return value


def public_path(cls: type) -> str:
    """``package.subpackage.Class`` where a package exports it, the outermost first, so that files survive a move of the module."""
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def build(base: type[T], description: dict[str, Any], source: str) -> T:
    """The object that `describe` described.

    Args:
        base: the class, abstract or not, that it must be an instance of.
        description: ``{"class_path", "init_args"}``.
        source: the file named in errors.

    Raises:
        UserError: the class is not a `base` of this package or of an imported module, or its arguments do not fit.
    """
    for path in _class_paths(description):
        module = path.rpartition(".")[0]
        if module.split(".")[0] != "gq_lightning" and module not in sys.modules:
            raise UserError(f"{source}: {path} is not a class of gq_lightning; import {module or path!r} first if you trust it")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("object", type=base)
    try:
        parsed = parser.parse_object({"object": description})
        return parser.instantiate(parsed)["object"]
    except (ArgumentError, TypeError, ValueError) as error:
        # jsonargparse explains over several lines, the last ones being the most specific
        reason = " ".join(str(error).split())[-300:]
        raise UserError(f"{source}: cannot build a {base.__name__} from {description.get('class_path')!r}: {reason}") from error


def fingerprint(identity: Any, state: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of what an object is: plain data (see `Recorded.identity`), and a state_dict's names and bytes."""
    # 1 and 1.0 are the same argument
    digest = hashlib.sha256(json.dumps(json.loads(json.dumps(identity), parse_int=float), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _class_paths(description: Any) -> list[str]:
    """All classes that a description names: building it would import their modules, and importing runs code."""
    if isinstance(description, dict):
        own = [str(description["class_path"])] if "class_path" in description else []
        return own + [path for value in description.values() for path in _class_paths(value)]
    return [path for item in description for path in _class_paths(item)] if isinstance(description, list) else []

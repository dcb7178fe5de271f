"""Objects that remember their constructor arguments, so that a tokenizer or a prior can be saved and rebuilt.

`describe` returns ``{"class_path": ..., "init_args": {...}}``, the form of LightningCLI's YAML files, and `build` reads it back.
A config comes from its user, but a saved tokenizer may come from anyone. So `build` accepts only a small part of what LightningCLI
accepts: plain values for known classes.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from gq_lightning.errors import UserError

T = TypeVar("T")
# of an image, in pixels: the side of a square, or height and width
Size = int | tuple[int, int]
# every number in a description must be smaller
LARGEST = 2**63
MOST_BLOCKS = 1000


class Recorded:
    """Mixin that keeps the constructor's arguments, defaults included, in `init_args`.

    Attributes:
        training_arguments: names of the arguments that affect training only. `identity` leaves them out.
        later_arguments: arguments added after the first release, each with the value that reproduces the earlier behaviour. `identity`
            leaves out an argument that has this value, so a new argument does not change the identity of earlier tokenizers.
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

    @classmethod
    def from_description(cls, description: Any, source: str) -> Self:
        """What `describe` described, which must be of this class; see `build`."""
        return build(cls, description, source)

    @classmethod
    def public_path(cls) -> str:
        """The path of the class in the outermost package that exports it."""
        return public_path(cls)

    def identity(self) -> dict[str, Any]:
        """Plain data, equal for two objects that give the same tokens and images from the same weights."""
        described = describe(self)
        arguments = {
            name: value.identity() if isinstance(value, Recorded) else described["init_args"][name]
            for name, value in self.init_args.items()
            if name not in self.training_arguments and not (name in self.later_arguments and value == self.later_arguments[name])
        }
        return described | {"init_args": arguments}


def describe(thing: Recorded) -> dict[str, Any]:
    """Plain data (JSON types) from which `build` makes an equal object; recorded objects nest."""
    arguments = {
        name: describe(value) if isinstance(value, Recorded) else list(value) if isinstance(value, tuple) else value
        for name, value in thing.init_args.items()
    }
    return {"class_path": public_path(type(thing)), "init_args": arguments}


def public_path(cls: type) -> str:
    """The path of a class in the outermost package that exports it, so that saved files survive a move of its module."""
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return _path(cls)


def build(base: type[T], description: Any, source: str) -> T:
    """The object that `describe` described; errors name the file `source`. It imports no module and instantiates only the classes that the
    description names. Raises UserError if the description has another form, its class is not a `base`, or its arguments do not fit.

    The class belongs to this package, or the caller has imported it. The arguments are numbers, strings, booleans, null, and lists of
    these, each of its parameter's type. A parameter that takes a recorded object takes a nested description.
    """
    fields = description if isinstance(description, dict) else {}
    path, arguments = fields.get("class_path"), fields.get("init_args", {})
    if not isinstance(path, str) or not isinstance(arguments, dict) or not fields.keys() <= {"class_path", "init_args"}:
        raise UserError(f"{source}: not a description of a {base.__name__}: give class_path, a string, and init_args, an object, alone")
    named = [cls for cls in _with_subclasses(base) if cls.__name__ == path.rpartition(".")[2] and not inspect.isabstract(cls)]
    known = [cls for cls in named if path in (public_path(cls), _path(cls))]
    if not known:
        raise UserError(
            f"{source}: class_path: {path!r:.100} is neither a {base.__name__} of gq_lightning nor an imported one: "
            "import its module first if you trust it"
        )
    try:
        hints = get_type_hints(known[-1].__init__)
        parameters = inspect.signature(known[-1]).parameters
        for name in arguments:
            if name not in parameters or parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                raise ValueError(f"it has no argument {name!r:.50}")
        return known[-1](**{name: typed(name, value, hints.get(name, Any)) for name, value in arguments.items()})
    except Exception as error:  # a constructor may raise anything for wrong arguments
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source}: cannot build a {base.__name__} from {path!r}: {reason}") from error


def sides(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shortened(size: Size) -> Size:
    """The same size, written as an int if it is a square: the form that is recorded, so that equal sizes are equal values."""
    height, width = sides(size)
    return height if height == width else (height, width)


def spelled(size: Size) -> str:
    """The size as it is given on the command line: 64, or [64,96]."""
    short = shortened(size)
    return str(short) if isinstance(short, int) else f"[{short[0]},{short[1]}]"


def check_cost(network: str, blocks: int, weights: float, **sizes: float) -> None:
    """Refuses a network that is too large. Constructors call this first, because the sizes come from a config or a saved file.

    Raises UserError if one of `sizes` is not positive and finite, there are more than 1 000 blocks, or this machine's memory cannot hold
    the approximate number of weights in float32.
    """
    for name, size in sizes.items():
        if not 0 < size < math.inf:
            raise UserError(f"{network}: {name} {size} is not positive: give a size above 0")
    if blocks > MOST_BLOCKS:
        raise UserError(f"{network}: {blocks} blocks are more than {MOST_BLOCKS}: use fewer")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    if 4 * weights > memory:
        raise UserError(
            f"{network}: {weights:.2g} weights take {4 * weights / 1e9:.3g} GB, but this machine has {memory / 1e9:.3g}: use smaller sizes"
        )


def fingerprint(identity: Any, state: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of an object's identity (see `Recorded.identity`) and the names and bytes of its state_dict."""
    # 1 and 1.0 are the same argument
    digest = hashlib.sha256(json.dumps(json.loads(json.dumps(identity), parse_int=float), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _with_subclasses(cls: type[T]) -> Iterator[type[T]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def typed(name: str, value: Any, wanted: Any) -> Any:
    """Converts a value from a file to the annotated type. Raises ValueError."""
    origin, options = get_origin(wanted), get_args(wanted)
    if isinstance(value, dict) and isinstance(wanted, type) and issubclass(wanted, Recorded):
        return build(wanted, value, name)
    if origin in (Union, UnionType):
        for option in options:
            with suppress(ValueError, UserError):
                return typed(name, value, option)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in options):
            return value
    elif type(value) is list:
        each = options[0] if options else Any
        if wanted in (Any, list, Sequence) or origin in (list, Sequence):
            return [typed(name, item, each) for item in value]
        if origin is tuple and options[1:] in ((), (...,)):
            return tuple(typed(name, item, each) for item in value)
        if origin is tuple and len(options) == len(value):
            return tuple(typed(name, item, option) for item, option in zip(value, options, strict=True))
    elif type(value) is dict and origin is Mapping:
        return {key: typed(name, item, options[1]) for key, item in value.items()}
    elif type(value) in (int, float) and wanted in (float, Any):
        if math.isfinite(value) and abs(value) < LARGEST:
            return float(value) if wanted is float else value
    elif type(value) is int:
        if wanted is int and abs(value) < LARGEST:
            return value
    elif (value is None and wanted in (None, NoneType, Any)) or (type(value) in (str, bool) and wanted in (type(value), Any)):
        return value
    raise ValueError(f"{name}: {value!r:.100} is not of type {getattr(wanted, '__name__', wanted)}")

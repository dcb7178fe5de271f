"""Builds a command line from the signature and the docstring of a function.

    def run(*images: Path, out: Path, size: PositiveInt | None = None, deterministic: bool = False) -> None:

    COMMAND IMAGES [IMAGES ...] --out OUT [--size SIZE] [--deterministic]

Positional parameters become positional arguments. Keyword parameters become options, required if they have no default. A bool becomes
--NAME and --no_NAME. A trailing underscore is dropped: `from_` is --from. A parameter without a text in the docstring has that of `TEXTS`.
jsonargparse checks the types.
"""

import inspect
import re
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from gq_lightning.errors import UserError

# of the options that several commands have
TEXTS = {
    "tokenizer": "a name of `models`, folder of a tokenizer or a run, or owner/repository on the hub",
    "device": "torch device; auto is a GPU if there is one",
    "threads": "CPU threads",
}


class _Parser(ArgumentParser):
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"<class\s+'(\w+)'>", r"\1", super().format_help(*args, **kwargs))


def parser_of(function: Callable[..., None], command: str) -> ArgumentParser:
    """The parser of `function`'s arguments, with the help texts from ``Args:`` in its docstring."""
    documentation = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = TEXTS | {parameter.arg_name: parameter.description for parameter in documentation.params}
    parser = _Parser(
        prog=f"python -m gq_lightning {command}", description=documentation.short_description, exit_on_error=False, allow_abbrev=False
    )
    parameters = inspect.signature(function).parameters
    if missing := [name for name in parameters if name not in texts]:
        raise TypeError(f"{function.__module__}.{function.__name__}: describe {', '.join(missing)} under `Args:` in its docstring")
    for name, parameter in parameters.items():
        option = name.rstrip("_")
        # None is the value of an option that is not given, so the help need not offer it
        types = [kind for kind in get_args(parameter.annotation) if kind is not NoneType]
        optional = len(types) == 1 and NoneType in get_args(parameter.annotation)
        options: dict[str, Any] = {"type": types[0] if optional else parameter.annotation, "help": texts[name]}
        if parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(name, nargs="+", **options)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            parser.add_argument(name, **options | ({} if parameter.default is parameter.empty else {"nargs": "?"}))
        elif parameter.default is parameter.empty:
            parser.add_argument(f"--{option}", required=True, **options)
        elif parameter.annotation is bool:
            parser.add_argument(f"--{option}", action=ActionYesNo, default=parameter.default, help=texts[name])
        else:
            parser.add_argument(f"--{option}", default=parameter.default, **options)
    return parser


def _plain(value: Any) -> Any:
    """A restricted number as a plain one: a PositiveInt as an int, also within a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return next((kind(value) for kind in (int, float) if isinstance(value, kind) and not isinstance(value, bool)), value)


def parse(function: Callable[..., None], command: str, args: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments for `function` from a command line. Options may also be written with hyphens. Raises UserError
    if an argument is unknown, missing or of the wrong type."""
    parser = parser_of(function, command)
    args = [re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), text) for text in args]
    try:
        named = {name: _plain(value) for name, value in vars(parser.parse_args(args)).items()}
    except ArgumentError as error:
        reason = re.sub(r'Parser key "(\w+)": ', r"--\1: ", " ".join(str(error).split()))
        raise UserError(f"{reason} (see {parser.prog} --help)") from error
    positional: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        named[name] = named.pop(name.rstrip("_"))
        if parameter.kind is not parameter.KEYWORD_ONLY:
            value = named.pop(name)
            positional += value if parameter.kind is parameter.VAR_POSITIONAL else [value]
    return positional, named

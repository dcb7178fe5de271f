"""Entry point of all commands. It knows their names and help lines only, and imports a command's module when it is called."""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

from gq_lightning.cli import commands
from gq_lightning.cli.configs import with_configs
from gq_lightning.cli.memory import keep_freed_memory
from gq_lightning.errors import UserError, printable

# LightningCLI's commands, see cli/training.py
TRAINING = {
    "fit": "Train, convert to a tokenizer by Gaussian Quant, measure.",
    "validate": "Measure a checkpoint on the data's evaluation set.",
    "test": "Measure a checkpoint likewise, with rFID.",
    "predict": "Write the tokens of the evaluation set to files.",
    "summary": "Show parameters, FLOPs and tokens of what fit would train.",
}
# configured in the same way, each in its own module of `cli`
CONFIGURED = {
    "tokenize": "Encode pictures to token sets, on which a prior is trained.",
    "prior": "Train a transformer over tokens (prior fit), or measure one (prior validate).",
}


def tools() -> dict[str, str]:
    """Maps each command in `cli.commands` to the first line of its module's docstring, without importing the modules."""
    found = {}
    for finder, name, _ in pkgutil.iter_modules(commands.__path__):
        spec = finder.find_spec(name)  # type: ignore[call-arg]
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        found[name.replace("_", "-")] = text.partition("\n")[0]
    return found


def usage() -> str:
    """The text of --help."""
    groups = {"train and measure, configured by YAML files and --key value": TRAINING | CONFIGURED, "tools": tools()}
    text = "usage: python -m gq_lightning COMMAND …       (every COMMAND has --help)\n"
    for title, listed in groups.items():
        text += f"\n{title}:\n" + "".join(f"  {name:<18}{line}\n" for name, line in listed.items())
    return text


def main(args: list[str] | None = None) -> int:
    """Runs a command and returns the exit status: 2 for wrong input, with one line on standard error; 130 for Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    keep_freed_memory()
    try:
        if args[0] in TRAINING:
            from gq_lightning.cli import training

            training.run(with_configs(args))
        elif args[0] in CONFIGURED:
            importlib.import_module(f"gq_lightning.cli.{args[0]}").run(with_configs(args[1:]))
        elif args[0] in tools():
            from gq_lightning.cli.signature import parse

            module = importlib.import_module(f"{commands.__name__}.{args[0].replace('-', '_')}")
            positional, named = parse(module.run, args[0], args[1:])
            module.run(*positional, **named)
        else:
            raise UserError(f"{args[0]} is not a command: use one of {', '.join([*TRAINING, *CONFIGURED, *tools()])}")
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        text = Exception.__str__(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        elif text.startswith("Caught "):  # an error from a worker process: a traceback whose last line is the message
            text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
        print(f"error: {printable(text or type(error).__name__)}", file=sys.stderr)
        return 2

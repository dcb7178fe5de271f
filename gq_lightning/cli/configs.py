"""The configs shipped with the package. A relative path that does not exist is looked up among them, from any working folder."""

from difflib import get_close_matches
from pathlib import Path

from gq_lightning.errors import UserError


def packaged() -> Path:
    """The folder `configs`, inside the installed package or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def find_config(name: str) -> str:
    """The path of a config: `name` if it exists, else the packaged file, so that configs/demo.yaml works from any folder. Raises UserError
    if neither exists; the message suggests similar names."""
    if Path(name).exists() or not name.endswith((".yaml", ".yml")):
        return name
    folder = packaged()
    if (found := folder.parent / name).is_relative_to(folder) and ".." not in Path(name).parts and found.is_file():
        return str(found)
    known = [path.relative_to(folder.parent).as_posix() for path in sorted(folder.rglob("*.yaml"))]
    by_stem = [path for path in known if Path(path).stem == Path(name).stem]
    near = list(dict.fromkeys([*by_stem, *get_close_matches(name, known, 3, 0.5)]))[:3]
    hint = f"did you mean {' or '.join(near)}, which come with gq_lightning?" if near else "correct the path"
    raise UserError(f"{name}: no such config, neither here nor in gq_lightning: {hint}")


def with_configs(args: list[str]) -> list[str]:
    """The command line with the argument of every --config replaced by `find_config` of it."""
    found = list(args)
    for index, text in enumerate(args):
        if text.startswith("--config="):
            found[index] = f"--config={find_config(text.removeprefix('--config='))}"
        elif index and args[index - 1] in ("--config", "-c"):
            found[index] = find_config(text)
    return found

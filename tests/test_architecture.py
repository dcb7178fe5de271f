"""The arrows between the rooms of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gq_lightning"
LEAVES = {"errors", "construction", "distributed", "files"}
# room -> what of gq_lightning it may import, beside itself and the leaves
ALLOWED = {
    "errors": set(),
    "construction": set(),
    "distributed": set(),
    "files": set(),
    "weights": set(),
    "lightning_internals": set(),
    "data": set(),
    "backbones": set(),
    "quantizers": set(),
    # contracts only: never a concrete backbone or quantizer
    "tokenizer": {"backbones.base", "quantizers.base"},
    "tokens": {"data"},
    "losses": {"weights"},
    "metrics": {"quantizers.base", "weights"},
    "training": {"backbones.base", "lightning_internals", "losses", "metrics", "quantizers.base", "tokenizer"},
    "evaluation": {"data", "metrics", "tokenizer"},
    "priors": {"data", "tokenizer", "tokens", "training"},
    # an importer names what it makes
    "importers": {"backbones", "quantizers", "tokenizer"},
    "callbacks": {
        "data",
        "evaluation",
        "lightning_internals",
        "priors",
        "quantizers.base",
        "quantizers.tdc",
        "tokenizer",
        "tokens",
        "training",
    },
    "cli": {
        "callbacks",
        "data",
        "evaluation",
        "importers",
        "lightning_internals",
        "priors",
        "tokenizer",
        "tokens",
        "training",
        "weights",
    },
    "__init__": {"tokenizer", "tokens"},
    "__main__": {"cli"},
}
MOST = {"rooms": 19, "floors": 8, "arrows": 75}


def imports(path: Path) -> set[str]:
    """Dotted names below gq_lightning that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "gq_lightning":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("gq_lightning."):
                found.add(node.module.removeprefix("gq_lightning."))
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("gq_lightning.") for alias in node.names if alias.name.startswith("gq_lightning")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ALLOWED[room] | LEAVES
    for name in imports(path):
        inside = name.split(".")[0] == room
        permitted = any(name == target or name.startswith(f"{target}.") for target in allowed)
        assert inside or permitted, f"{path.relative_to(PACKAGE)} may not import gq_lightning.{name}"


def test_the_house_is_of_this_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Rooms, arrows between them, and floors: the longest way down. There is no circle, or the way would have no end.

    The doors, __init__ and __main__, are no rooms.
    """
    arrows: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        arrows.setdefault(room, set()).update(name.split(".")[0] for name in imports(path) if name.split(".")[0] in ALLOWED)
    arrows = {room: targets - {room} for room, targets in arrows.items() if not room.startswith("__")}

    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"a circle: {' -> '.join((*above, room))}"
        return 1 + max((floor(target, (*above, room)) for target in arrows[room]), default=0)

    found = {"rooms": len(arrows), "floors": max(map(floor, arrows)), "arrows": sum(map(len, arrows.values()))}
    with capsys.disabled():
        print(f"\nthe house: {', '.join(f'{count} {name}' for name, count in found.items())}")
    assert all(found[name] <= most for name, most in MOST.items()), found


def test_nothing_imports_the_experiments() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "experiments" not in {name.split(".")[0] for name in imports(path)}


def test_files_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, f"{path}: do two ideas share a room?"

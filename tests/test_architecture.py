"""The arrows between the rooms of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gq_lightning"
LEAVES = {"errors", "construction", "distributed", "files"}
# module or package -> what of gq_lightning it may import, beside itself and the leaves
ALLOWED = {
    "errors": set(),
    "construction": set(),
    "distributed": set(),
    "files": set(),
    "theory": set(),
    "windows": set(),
    "optimization": set(),
    "weights": set(),
    "hub": set(),
    "data": set(),
    "backbones": set(),
    "quantizers": {"theory"},
    "perceptual": {"weights"},
    "losses": {"perceptual"},
    "discriminator": set(),
    "adversary": {"discriminator"},
    "pretrained": {"backbones.base", "hub", "quantizers.base"},
    "metrics": {"perceptual", "weights", "theory"},
    # contracts only: never a concrete backbone or quantizer
    "tokenizer": {"adversary", "backbones.base", "quantizers.base", "losses", "metrics", "optimization", "pretrained", "report", "windows"},
    "report": set(),
    "token_file": set(),
    "codec": {"data", "token_file"},
    "evaluation": {"data", "tokenizer"},
    # an importer, and so it names what it makes
    "published": {"backbones", "quantizers", "tokenizer"},
    "callbacks": {"data", "evaluation", "quantizers.base", "quantizers.tdc", "report", "token_file", "tokenizer"},
    "commands": {"callbacks", "codec", "data", "evaluation", "pretrained", "published", "quantizers", "report", "tokenizer", "weights"},
    "summary": {"theory", "tokenizer"},
    "cli": {"callbacks", "commands", "data", "summary", "tokenizer"},
    "__init__": {"tokenizer"},
    "__main__": {"cli"},
}


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


def test_nothing_imports_the_experiments() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "experiments" not in {name.split(".")[0] for name in imports(path)}


def test_files_are_short() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 320, f"{path}: do two ideas share a room?"

"""What the documentation shows works: Python blocks run, commands parse, links lead somewhere, the notebook runs from top to bottom."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gq_lightning.cli import commands, tokenize
from gq_lightning.cli.configs import with_configs
from gq_lightning.cli.main import CONFIGURED, TRAINING, main, tools
from gq_lightning.cli.prior import PriorCommandLine
from gq_lightning.cli.runs import RunCommandLine
from gq_lightning.cli.signature import parse
from gq_lightning.cli.training import CommandLine, SummaryCommand, with_start
from gq_lightning.tokenizer.box import BOX

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *sorted(BOX.glob("*/README.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "experiments").glob("*.md"))]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file())
NOTEBOOK = ROOT / "examples/tokens.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore")

# blocks that are not run here, and why
NOT_RUN = {"docs/export.md": "tests/test_export.py runs it, on a graph that it exports"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(path: Path) -> list[str]:
    """Each behind as many empty lines that a traceback shows the page's line."""
    text = path.read_text()
    return [
        "\n" * text[: found.start(1)].count("\n") + found[1]
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


SHOWN = [path for path in PAGES if python_blocks(path)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: a run, photographs, the token file of one, a token set of two."""
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "pictures").mkdir()
    (folder / "held_out").mkdir()
    for seed, path in enumerate(("photo.jpg", "pictures/a.jpg", "pictures/b.jpg", "held_out/c.jpg")):
        noise = torch.randint(0, 256, (64, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        Image.fromarray(noise.numpy()).save(folder / path)
    shutil.copytree(BOX / "gq-small-16", folder / "runs/demo/tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["encode", "--tokenizer=gq-small-16", "photo.jpg", "--out=tokens"]) == 0
        data = [f"--data.init_args.{option}" for option in ("root=pictures", "validation_root=held_out", "image_size=32", "workers=0")]
        assert main(["tokenize", "--tokenizer=gq-small-16", "--config=configs/data/folder.yaml", *data, "--out=tokens/mine"]) == 0
    return folder


@pytest.mark.parametrize("path", SHOWN, ids=name)
def test_python_blocks_run(path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one namespace: a page is read from its top."""
    if name(path) in NOT_RUN:
        pytest.skip(NOT_RUN[name(path)])
    monkeypatch.chdir(scratch)
    # a model card speaks of the reader's own images
    found: dict[str, Any] = {"images": torch.zeros(1, 3, 32, 32)} if path.is_relative_to(BOX) else {}
    for code in python_blocks(path):
        exec(compile(code, str(path), "exec"), found)


def test_pages_with_blocks_are_found() -> None:
    found = set(map(name, SHOWN))
    assert {"README.md", "docs/start.md", "docs/concepts.md", "docs/finetuning.md", "docs/priors.md", *NOT_RUN} <= found


# Commands

# what stands for the reader's own, for more of a command, or for what another program fills in
PLACEHOLDERS = {
    "--config …": "--config configs/demo.yaml",
    "fit …": "fit --config configs/demo.yaml",
    "…": "",
    "16|32|64": "16",
    "quantizer/NAME.yaml": "quantizer/fsq.yaml",
    "tokenizers/sd-64": "gq-small-16",
    '"$@"': "",
}


def command_lines(path: Path) -> Iterator[str]:
    """The arguments of each `gq_lightning` in a text: in a block, in `code`, or in the comment at the top of a config."""
    text = re.sub(r"\s*\\\n[# ]*", " ", path.read_text())
    variables = dict(re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE))
    variables |= re.findall(r"With `(\w)` as `([^`]*)`", " ".join(text.split()))
    for line in re.findall(r"-m gq_lightning ([^\n`]*)", text):
        line = re.sub(r"\$(\w+)", lambda found: variables[found[1]], line)
        for shown, meant in PLACEHOLDERS.items():
            line = line.replace(shown, meant)
        # without a remark behind it
        yield re.sub(r"\s+# .*|\s+\(.*|, then .*|[\[\]]", "", line).strip().rstrip(".,;:")


def commands_in(paths: list[Path]) -> set[str]:
    return {line for path in paths for line in command_lines(path)} - {""}


COMMANDS = sorted(commands_in(TEXTS))
HEADERS = sorted(commands_in(CONFIGS) - set(COMMANDS))


class OnlyParsed:
    """A training's command line without what follows its parsing."""

    def nothing(self, *_: Any) -> None: ...

    before_instantiate_classes = instantiate_classes = after_instantiate_classes = _run_subcommand = nothing


@cache
def command_line(command: str) -> RunCommandLine:
    """One whose parser is used for all lines: building it takes longer than parsing."""
    kind = {"prior": PriorCommandLine, "summary": SummaryCommand}.get(command, CommandLine)
    action, demo = ("fit", "demo_prior") if command == "prior" else (command, "demo")
    own = {} if command == "summary" else {"subcommands": staticmethod(lambda: {action: kind.subcommands()[action]})}
    words = [*([] if command == "summary" else [action]), f"--config={ROOT}/configs/{demo}.yaml"]
    return type("Parsed", (OnlyParsed, kind), own)(words)


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises UserError, ArgumentError or KeyError, or ends, if no command takes these arguments."""
    command, *arguments = shlex.split(line)
    if not arguments:  # a command is mentioned
        assert command in [*TRAINING, *CONFIGURED, *tools()]
    elif command in tools():
        parse(import_module(f"{commands.__name__}.{command.replace('-', '_')}").run, command, arguments)
    elif command == "tokenize":
        monkeypatch.setattr("gq_lightning.cli.tokenize.tokenize", wraps(tokenize.tokenize)(lambda **_: None))
        tokenize._run(with_configs(arguments))
    else:
        words = arguments if command in ("prior", "summary") else [command, *arguments]
        cli = command_line(command)
        cli.parse_arguments(cli.parser, with_start(with_configs(words)))


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 40 and len(HEADERS) > 20
    assert {line.split()[0] for line in COMMANDS} >= {*tools(), *CONFIGURED, "fit", "summary"}


@pytest.mark.parametrize("line", [*COMMANDS, *(pytest.param(line, marks=pytest.mark.slow) for line in HEADERS)])
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, monkeypatch)


@pytest.mark.parametrize(
    "line", ["fit --config configs/demo.yaml --nome x", "encode a.png --tokeniser T --out o", "summary --config configs/x.yaml"]
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(line, monkeypatch)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_make_has_the_targets(path: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "site"} <= targets
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", path.read_text(), re.MULTILINE)) <= targets


# Links and lengths


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)", text):
        file = path.parent / target if target else path
        assert file.exists(), target
        headings = (
            [re.sub(r"[^\w\s-]", "", line.strip("# ").lower()).replace(" ", "-") for line in re.findall(r"^#.*", file.read_text(), re.M)]
            if anchor
            else []
        )
        assert not anchor or anchor in headings, f"{target}#{anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


# The notebook


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) > 8
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3

"""Pages of the site that are no files of docs/: what links lead to outside of docs/, the commands' own --help, the Python API.

A file of the repository has the same path in the site, without docs/. Text that is not Markdown is shown as a page of code, and a
notebook as text and code. So a link works in the repository and in the site alike.
"""

import json
import os
import posixpath
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# pages outside docs/ that the navigation names; the rest are found by their links
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/tokens.ipynb", "experiments/README.md", "experiments/LOG.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
COPIED = {".md", ".png", ".jpg", ".svg"}
# rooms of the package whose `__all__` is public
PUBLIC = (
    "gq_lightning",
    *(f"gq_lightning.{room}" for room in ("tokens", "quantizers", "backbones", "data", "losses", "metrics")),
    *(f"gq_lightning.{room}" for room in ("training.module", "callbacks", "priors")),
)


def place(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    if (ROOT / path).is_dir():
        return f"{path}/README.md"
    return path.removeprefix("docs/") if Path(path).suffix in COPIED else f"{path}.md"


def source(page: str) -> str:
    """The file of the repository that a page of the site shows."""
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page


def links(path: str, text: str) -> dict[str, str]:
    """Maps each link in the text of a file to the file or folder of the repository where it leads."""
    found = {link: posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)}
    return {link: target for link, target in found.items() if (ROOT / target).exists()}


def shown(path: str) -> str:
    """A file or folder of the repository as Markdown."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.is_file())
        return "\n".join([f"# {path}\n", *(f"- [{name}]({name})" for name in names)])
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(words if kind == "markdown" else f"```python\n{words}\n```" for kind, words in cells)
    return f"---\nhide: [toc]\n---\n# {path}\n\n````{file.suffix[1:]}\n{text}\n````"


def api() -> str:
    return "# Python API\n\nWhat the package's rooms export.\n\n" + "\n\n".join(f"::: {room}" for room in PUBLIC).replace(
        "::: gq_lightning\n", "::: gq_lightning\n    options: {inherited_members: true}\n"
    )


def help_of(command: str) -> str:
    """What --help prints."""
    from gq_lightning.cli.main import main

    os.environ["COLUMNS"] = "92"
    text = StringIO()
    with redirect_stdout(text):
        try:
            main([*command.split(), "--help"])
        except SystemExit as end:
            assert end.code in (0, None), command
    return text.getvalue().replace(" \b", "")  # which jsonargparse prints before an optional value


def options(text: str) -> list[str]:
    """The descriptions of the options in the text of --help."""
    return re.findall(r"^  --?[^\n]*\n(?: {3,}[^\n]*\n)*", text, re.MULTILINE)


def commands() -> str:
    """The page of all commands. The options of fit stand once: of a command that shares them, the page shows the others."""
    from gq_lightning.cli.main import CONFIGURED, TRAINING, tools

    def section(command: str, text: str) -> str:
        return f"\n## {command}\n\n```text\n{text.strip()}\n```\n"

    whole = help_of("fit")
    page = "# Command line\n\n`python -m gq_lightning COMMAND`, or `gq_lightning COMMAND`:\n\n| | |\n|---|---|\n"
    for command, line in (TRAINING | CONFIGURED | tools()).items():
        page += f"| [`{command}`](#{command if command != 'prior' else 'prior-fit'}) | {line} |\n"
    page += section("fit", whole.partition("\n\n")[2])
    for command in [name for name in TRAINING if name != "fit"] + ["prior fit", "prior validate"]:
        text = help_of(command)
        own, shared = [[entry for entry in options(text) if (entry in whole) == both] for both in (False, True)]
        assert len(shared) > 40, command
        page += section(command, f"{len(shared)} options of fit, and:\n\n{''.join(own)}")
    return page + "".join(section(command, help_of(command)) for command in ["tokenize", *tools()])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated, and the files of the repository that a page links to, and those that these link to."""
    for name, text in (("api.md", api()), ("commands.md", commands())):
        files.append(File.generated(config, name, content=text))
    cards = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "gq_lightning/box").glob("*/README.md"))
    todo: list[str] = [*(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")), *OUTSIDE, *cards]
    seen: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        text = None if Path(path).suffix in COPIED - {".md"} else shown(path)
        if not path.startswith("docs/"):
            kept = {"abs_src_path": str(ROOT / path)} if text is None else {"content": text}
            files.append(File.generated(config, place(path), **kept))
        todo += links(f"{path}/" if (ROOT / path).is_dir() else path, text or "").values()
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links lead to where the site has the files."""
    here = page.file.src_uri
    found = links(source(here), markdown)
    return LINK.sub(
        lambda link: posixpath.relpath(place(found[link[0]]), posixpath.dirname(here) or ".") if link[0] in found else link[0], markdown
    )

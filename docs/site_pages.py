"""Pages of the site that are kept elsewhere: the README, the notebook, CONTRIBUTING.md and CHANGELOG.md.

mkdocs calls the functions named `on_...`. The links are rewritten from where the files lie to where the pages are.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Files of the repository that are no pages: the site shows their names, without a link.
NOT_PAGES = ("CITATION.cff", "LICENSE")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    """Let mkdocstrings read a tree of links, where every folder has the `__init__.py` that it asks of a package."""
    package = Path(tempfile.mkdtemp(prefix="errata-site-")) / "errata"
    _link(ROOT / "src" / "errata", package)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package.parent)]
    return config


def _link(folder: Path, copy: Path) -> None:
    """Make a folder, with links to the Python files of another and the same for the folders in it."""
    copy.mkdir()
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            _link(entry, copy / entry.name)
        elif entry.suffix == ".py":
            (copy / entry.name).symlink_to(entry.resolve())
    if not (copy / "__init__.py").exists():
        (copy / "__init__.py").touch()


def on_post_build(config: Any) -> None:
    """Remove the links."""
    (folder,) = config.plugins["mkdocstrings"].config.handlers["python"]["paths"]
    shutil.rmtree(folder)


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each of these files."""
    for name, page in TOP.items():
        text = _relinked((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    book = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    files.append(File.generated(config, "quickstart.md", content=_relinked(_markdown(book))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Links of pages to the files above."""
    return _relinked(markdown)


def _relinked(text: str) -> str:
    """Turn links to files of the repository into links to pages."""
    for name, page in TOP.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(name)}([)#])", rf"]({page}\1", text)
    for name in NOT_PAGES:
        text = re.sub(rf"\[([^\]]+)\]\((?:\.\./)?{re.escape(name)}\)", r"`\1`", text)
    return text.replace("](docs/", "](").replace("](quickstart.ipynb", "](quickstart.md")


def _markdown(book: dict[str, Any]) -> str:
    """Return the cells of a notebook as Markdown, each with what it shows."""
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            shown = "".join(output["data"]["text/plain"])
            parts.append(f'```text title="shows"\n{shown}\n```')
    return "\n\n".join(parts) + "\n"

"""Links of the documents lead somewhere, and the files and folders that they name are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = ("editors/", "benchmarks/", "evaluate/", "hparams/", "tests/", "src/", "docs/", "core/")
# What the text makes up, or what a command writes.
MADE_UP = re.compile(r"NAME|MODEL|\*|\.\.\.")


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(path: Path) -> set[str]:
    """The names that headings get, as the site and the usual hosts make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, DOCS / "quickstart.ipynb"], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_are_there(path: Path) -> None:
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    named = [
        name for name in re.findall(r"`([\w./-]+)`", text) if name.startswith(FOLDERS) and not MADE_UP.search(name)
    ]
    places = [ROOT, ROOT / "editors", ROOT / "tests", ROOT / "src" / "errata"]
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]  # type: ignore[attr-defined]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = pages(site["nav"])
    assert len(listed) == len(set(listed))
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(listed) == written | {"index.md", "quickstart.md", "contributing.md", "changelog.md"}

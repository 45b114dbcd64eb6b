"""A class name means one thing in the whole code."""

from __future__ import annotations

import ast

import pytest
from source_files import Source, library


def twice(sources: list[Source]) -> dict[str, list[str]]:
    """Return public classes at the top of modules that share their name, with their files."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(source.path)
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_a_public_class_name_means_one_thing_in_the_whole_library() -> None:
    assert not twice(library())


@pytest.mark.parametrize("other", ["evaluate/probes.py", "src/errata/cli/main.py"])
def test_two_classes_of_one_name_are_noticed(other: str) -> None:
    paths = ["benchmarks/runs/sweeps.py", other]
    assert twice([Source(path, "import abc\n\n\nclass Plan(abc.ABC): ...") for path in paths]) == {"Plan": paths}


def test_private_and_nested_classes_may_share_a_name() -> None:
    text = "class _Plan: ...\n\n\nclass {}:\n    class Config: ..."
    assert not twice([Source("editors/rome.py", text.format("ROME")), Source("editors/mend.py", text.format("MEND"))])

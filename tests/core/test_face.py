"""The packages that give names to others: every name is there, once, and is imported only when it is asked for."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACES = ("errata", "errata.editors.core", "errata.testing")
FOLDERS = ("editors", "evaluate", "benchmarks", "src/errata/cli", "src/errata/playground", "src/errata/testing")


def for_type_checkers(face: str) -> dict[str, str]:
    """By name: the module that the face imports it from where TYPE_CHECKING holds."""
    (block,) = [
        node
        for node in ast.parse(inspect.getsource(importlib.import_module(face))).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in found for alias in node.names}


@pytest.mark.parametrize("face", FACES)
def test_a_name_is_the_same_for_type_checkers_for_help_and_at_run_time(face: str) -> None:
    module = importlib.import_module(face)
    said = for_type_checkers(face)
    assert set(module.__all__) - {"__version__"} == set(said)
    assert set(module.__all__) <= set(dir(module))
    assert len(set(module.__all__)) == len(module.__all__)
    for name, home in said.items():
        given = getattr(module, name)
        assert given is (importlib.import_module(f"{home}.{name}") if home == face else vars(sys.modules[home])[name])
    with pytest.raises(AttributeError, match="'Edtior'"):
        _ = module.Edtior


@pytest.mark.parametrize("face", FACES)
def test_a_face_alone_imports_nothing_heavy(face: str) -> None:
    code = f"import sys, {face}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_library_imports_from_modules_and_not_from_the_face_for_authors() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "errata.editors.core"
        if not all((ROOT / "editors" / "core" / f"{alias.name}.py").exists() for alias in node.names)
    ]
    assert not found, found

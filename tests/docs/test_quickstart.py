"""The notebook is run from top to bottom, and shows what is kept in it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

BOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    book = json.loads(BOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def kept(cell: dict[str, Any]) -> str | None:
    """What a cell shows, as it is kept in the notebook."""
    if not cell["outputs"]:
        return None
    (output,) = cell["outputs"]
    return "".join(output["data"]["text/plain"])


def value_of(cell: dict[str, Any], names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: the value of an expression at its end is what it shows."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, BOOK.name, "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, BOOK.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), BOOK.name, "eval"), names)


@pytest.fixture(scope="module")
def ran() -> list[tuple[Any, str | None]]:
    """What every cell has shown now, beside what is kept of it."""
    names: dict[str, Any] = {}
    return [(value_of(cell, names), kept(cell)) for cell in code_cells()]


def test_every_cell_shows_what_is_kept_in_the_notebook(ran: list[tuple[Any, str | None]]) -> None:
    assert len(ran) > 6
    told = [(value, text) for value, text in ran if not isinstance(value, tuple) or not isinstance(value[-1], dict)]
    assert len(told) == len(ran) - 1
    assert [repr(value) if value is not None else None for value, _ in told] == [text for _, text in told]


def test_the_first_edit_changes_its_own_fact_alone_and_undoing_it_changes_that_back(
    ran: list[tuple[Any, str | None]],
) -> None:
    before, edited = ran[0][0], ran[1][0]
    assert [now != was for was, now in zip(before, edited, strict=True)] == [True, False, False, False]
    assert ran[-1][0] == before[:1]
    assert True in [value for value, _ in ran if isinstance(value, bool)]


def test_the_costs_that_the_notebook_tells_of_are_there(ran: list[tuple[Any, str | None]]) -> None:
    """Counts of neighbours may differ by one between machines, so that their order is what is promised."""
    ((*_, shown),) = [value for value, _ in ran if isinstance(value, tuple) and isinstance(value[-1], dict)]
    held = {name: int(text.split()[0]) for name, text in shown.items()}
    assert held["rome"] < held["memit"] <= held["untouched"] == 5


def test_the_notebook_is_small_and_names_no_machine() -> None:
    text = BOOK.read_text(encoding="utf-8")
    assert len(text) < 20_000
    assert "/tmp" not in text
    assert "/home" not in text

"""Command lines that tests carry out in their own process."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from errata.cli import main


def run(*arguments: str, code: int = 0) -> str:
    """Run a command that ends with this code, and return what it has shown."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    assert main.run(list(arguments), console, console) == code, out.getvalue()
    return out.getvalue()


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that fails, and return its one line of complaint."""
    monkeypatch.setattr(sys, "argv", ["errata", *arguments])
    assert main.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("errata: ")
    return lines[0]

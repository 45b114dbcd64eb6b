"""Writes the list of commands into docs/commands.md, from their records.

python tests/support/write_commands_page.py
"""

from __future__ import annotations

from pathlib import Path

from errata.cli.command_table import filled_in, reference
from errata.cli.commands import COMMANDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"

if __name__ == "__main__":
    PAGE.write_text(filled_in(PAGE.read_text(encoding="utf-8"), reference(COMMANDS)), encoding="utf-8")

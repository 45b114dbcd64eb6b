"""A package of someone else: its files are taken from a page of docs/, installed by pip and used in another process.

That process is a fork (forked.py), which finds errata imported. The package itself is imported by it, from `target`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from forked import output_of

# Carries out several commands of errata in one process, each given as a list of words.
COMMANDS = """
import json, sys
from rich.console import Console
from errata.cli import main
console = Console(width=200)
for words in json.loads(sys.argv[1]):
    code = main.run(words, console, console)
    if code:
        sys.exit(code)
"""


def install(files: Mapping[str, str], source: Path, target: Path) -> Path:
    """Write a package's files into `source`, install it into `target` without a network, and return `target`."""
    source.mkdir(parents=True)
    for name, text in files.items():
        (source / name).write_text(text, encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300)
    return target


def register(folder: Path, name: str, group: str, points: Mapping[str, str]) -> None:
    """Leave in `folder` what pip leaves of a package with these entry points, without its modules."""
    about = folder / f"{name}-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def python(code: str, *arguments: str, target: Path, folder: Path) -> str:
    """Run Python code in a process that finds the packages in `target` and works in `folder`; return its output."""

    def work() -> None:
        sys.path.insert(0, str(target))
        sys.argv = ["-c", *arguments]
        os.chdir(folder)
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})

    with tempfile.TemporaryDirectory() as outside:
        return output_of(work, Path(outside) / "process")

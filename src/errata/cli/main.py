"""The entry point of the command line: finds the record of a command and carries it out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.cli import exit_codes
from errata.cli.commands import COMMANDS, find
from errata.cli.help import HELP_FLAGS, overview, show_help, wants_help
from errata.cli.messages import complain, say
from errata.editors.core.errors import ErrataError

if TYPE_CHECKING:
    from rich.console import Console


def main() -> int:
    """Carry out the command line of this process and return its exit code."""
    from errata.cli.consoles import PlainConsole

    # Tables keep their columns in a file or a pipe.
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    errors = PlainConsole(stderr=True)
    # Advice from transformers would appear between errata's own lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # The imports make half a million objects that stay, and each look through them for garbage takes time.
    gc.set_threshold(50_000)
    # Threads that spin while they wait take the cores from other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return run(sys.argv[1:], console, errors)
    except KeyboardInterrupt:
        resumes = any(command.resumes for command in COMMANDS if command.name in sys.argv[1:2])
        continues = "; the same command continues where it stopped" if resumes else ""
        errors.print(f"\n[yellow]stopped[/]{continues}")
        return exit_codes.INTERRUPTED
    except ErrataError as error:
        complain(errors, error)
        return exit_codes.MISTAKE
    except OSError as error:
        from errata.benchmarks.runs.run_status import is_ours

        if is_ours(error):
            raise
        complain(errors, error)
        return exit_codes.MISTAKE


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one command line.

    Args:
        arguments: What was typed after `errata`.
        console: Where results go.
        errors: Where progress, warnings and complaints go.

    Returns:
        The exit code.

    Raises:
        ErrataError: Something that the user can correct.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else (HELP_FLAGS[0], [])
    if name == "help" and rest:
        name, rest = rest[0], [HELP_FLAGS[0]]
    if name in (*HELP_FLAGS, "help"):
        console.print(overview(COMMANDS), end="", markup=False, highlight=False, soft_wrap=True)
        return exit_codes.DONE
    if name in ("-V", "--version"):
        from importlib.metadata import version

        say(console, f"errata {version('errata')}")
        return exit_codes.DONE
    command = find(name)
    if wants_help(command, rest):
        show_help(command, rest, console)
        return exit_codes.DONE
    return command.run(rest, console, errors)


if __name__ == "__main__":
    sys.exit(main())

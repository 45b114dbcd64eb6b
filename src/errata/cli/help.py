"""What `errata --help` and `errata COMMAND --help` show, made from the records of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from errata.cli.command import GROUPS, Command
from errata.cli.exit_codes import MEANINGS
from errata.cli.messages import say

if TYPE_CHECKING:
    from rich.console import Console

HELP_FLAGS = ("-h", "--help")
# Commands whose examples the overview shows.
TOUR = ("edit", "bench", "train", "apply", "compare", "report")


def overview(commands: Sequence[Command]) -> str:
    """Return the text of `errata --help`."""
    lines = ["errata: correct single facts in a language model, undo any correction, measure what it cost.", ""]
    width = max(len(command.name) for command in commands)
    for group in GROUPS:
        members = [command for command in commands if command.group == group]
        lines += [f"{group}:", *(f"  errata {each.name:<{width}}   {each.summary}" for each in members), ""]
    lines += ["Examples:", *(f"  {line}" for line in tour(commands)), ""]
    lines += ["Exit codes:", *_columns([(str(code), meaning) for code, meaning in MEANINGS]), ""]
    lines += ["`errata COMMAND --help` shows what a command takes; `errata --version` shows the version."]
    return "\n".join(lines) + "\n"


def tour(commands: Sequence[Command]) -> list[str]:
    """Return the examples of the overview, in an order in which they can be run."""
    examples = {command.name: command.examples for command in commands}
    return [line for name in TOUR for line in examples[name]]


def wants_help(command: Command, arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for help, or are missing where the command needs some."""
    return any(flag in arguments for flag in HELP_FLAGS) or (command.needs_arguments and not arguments)


def show_help(command: Command, arguments: Sequence[str], console: Console) -> None:
    """Show what a command takes. For a command that Hydra configures, this includes every name with its value.

    Args:
        command: The record.
        arguments: What was typed after its name. Overrides among them change the values that are shown.
        console: Where the help goes.

    Raises:
        ConfigError: An override has an unknown name or value.
    """
    say(console, "\n".join(usage(command)))
    if command.config is None:
        return
    from errata.cli import configuration, overrides

    sweep = any(flag in arguments for flag in configuration.MULTIRUN)
    given = [argument for argument in arguments if "=" in argument and argument.partition("=")[0] not in command.names]
    given = command.as_overrides(given, sweep)
    values = configuration.compose_first(command.config, given, sweep=sweep)
    say(console, "\nChoices:")
    for group in overrides.GROUPS:
        if group in values or command.config == "bench":
            say(console, f"{group}=  {', '.join(overrides.choices_of(group))}")
    say(console, "\nNames and values:\n")
    configuration.show_yaml(command.config, values, console)


def usage(command: Command) -> Iterator[str]:
    """Yield the lines of a command's help that follow from its record alone."""
    yield command.summary
    yield from ("", "Usage:", *(f"  errata {command.name} {form}".rstrip() for form in command.usage))
    for note in command.notes:
        yield from ("", note)
    if options := (*command.options, *command.overrides):
        yield from ("", "Options:", *_columns([(option.usage, option.help) for option in options]))
    if command.examples:
        yield from ("", "Examples:", *(f"  {line}" for line in command.examples))
    if command.exit_codes:
        yield from ("", "Exit codes:", *_columns([(str(code), meaning) for code, meaning in command.exit_codes]))


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}   {right}" for left, right in rows]

"""The arguments of a command, sorted into words, values by name and flags."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from errata.cli.command import Command
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ArchitectureError, ConfigError


@dataclass(frozen=True)
class Arguments:
    """The arguments of one command.

    Attributes:
        words: Arguments that are neither flags nor values, in their order.
        values: The value of each `name=value`, by name.
        flags: Arguments that begin with a dash.
    """

    words: tuple[str, ...]
    values: Mapping[str, str]
    flags: frozenset[str]


def parse(arguments: Sequence[str], command: Command, *, also: Sequence[str] = ()) -> Arguments:
    """Sort arguments of a command into words, values and flags; Hydra has no part in it.

    An argument with `=` is a word where it can only be a path: the command takes no values, a slash comes before the
    `=`, or a file of this name exists.

    Args:
        arguments: What was typed after the command's name.
        command: Its options say which names and flags there are.
        also: Further names of values.

    Raises:
        ConfigError: The command has no such flag or name, or one name is given twice.
    """
    rest, flags = split_flags(arguments, command)
    words, values, known = [], {}, (*command.names, *also)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not equals or not known or "/" in name:
            words.append(argument)
        elif name in values:
            raise ConfigError(f"{name} is given twice, as {name}={values[name]} and {argument}; leave one out")
        elif name in known:
            values[name] = value
        elif Path(argument).exists():
            words.append(argument)
        else:
            raise ConfigError(f"unknown name {name!r}{did_you_mean(name, known)}")
    return Arguments(tuple(words), values, flags)


def parse_values(arguments: Sequence[str], command: Command) -> Arguments:
    """Sort arguments of a command that takes no words.

    Raises:
        ConfigError: As `parse`, or there is a word.
    """
    given = parse(arguments, command)
    if given.words:
        raise ConfigError(f"expected name=value, got {given.words[0]!r}")
    return given


def split_flags(arguments: Sequence[str], command: Command) -> tuple[list[str], frozenset[str]]:
    """Separate the flags of a command from its other arguments.

    Raises:
        ConfigError: The command has no such flag.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if unknown := [flag for flag in flags if flag not in command.flags]:
        raise ConfigError(f"unknown option {unknown[0]!r}; {_known_flags(command)}")
    return [argument for argument in arguments if not argument.startswith("-")], frozenset(flags)


def _known_flags(command: Command) -> str:
    if not command.flags:
        return f"`errata {command.name} --help` shows what it takes"
    *others, last = command.flags
    return f"there are {', '.join(others)} and {last}" if others else f"there is {last}"


def whole_number(name: str, values: Mapping[str, str], *, least: int = 0) -> int | None:
    """Return a value as a whole number, or None where it is not given.

    Raises:
        ConfigError: It is no whole number, or smaller than `least`.
    """
    if name not in values:
        return None
    if not values[name].isdecimal():
        raise ConfigError(f"{name}: expected a number, got {values[name]!r}")
    if int(values[name]) < least:
        raise ConfigError(f"{name}: expected at least {least}, got {values[name]}")
    return int(values[name])


def number(name: str, text: str) -> float:
    """Return what was typed for a name as a finite number.

    Raises:
        ConfigError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name}: expected a number, got {text!r}")
    return value


@contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Name the value that was typed in errors about what it means.

    Raises:
        ConfigError: What is inside the `with` has refused the value.
    """
    try:
        yield
    except (ConfigError, ArchitectureError) as error:
        raise ConfigError(f"{name}: {error}") from error


def is_true(name: str, values: Mapping[str, str]) -> bool:
    """Return whether a value is "true"; False where it is not given.

    Raises:
        ConfigError: It is neither true nor false.
    """
    value = values.get(name, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{name}: expected true or false, got {value!r}")
    return value == "true"

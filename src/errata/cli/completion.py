"""`errata completion`: prints a script that completes commands, the names of options, and their values.

    eval "$(errata completion bash)"                                   in ~/.bashrc
    eval "$(errata completion zsh)"                                    in ~/.zshrc, after compinit
    errata completion fish > ~/.config/fish/completions/errata.fish

The script holds its words: the records of the commands, the Hydra tree, and the methods that are installed when it is
written. Completing therefore starts no Python. Names with a dot (`dataset.path`) are offered once the dot is typed, and
the values of a list after each comma.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from errata.cli.arguments import split_flags
from errata.cli.command import TOOLS, Command
from errata.cli.exit_codes import DONE
from errata.cli.shells import SHELLS, Words
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# Words that can stand in a script unquoted, in every shell. Another package's method can have any name.
_PLAIN = re.compile(r"[A-Za-z0-9_./=-]+")


def command_for(others: Sequence[Command]) -> Command:
    """Return the record of `errata completion`, which completes itself and all other commands."""
    return Command(
        name="completion",
        usage=("bash|zsh|fish",),
        summary="Print a script that completes commands in bash, zsh or fish.",
        group=TOOLS,
        run=partial(_run, others),
        notes=(
            'For bash, add the line `eval "$(errata completion bash)"` to ~/.bashrc.',
            'For zsh, add the line `eval "$(errata completion zsh)"` to ~/.zshrc, after compinit.',
            "For fish, run `errata completion fish > ~/.config/fish/completions/errata.fish` once.",
        ),
        choices=lambda: SHELLS,
    )


def _run(others: Sequence[Command], arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Print the script of a shell.

    Raises:
        ConfigError: There is no such shell.
    """
    this = command_for(others)
    shells, _ = split_flags(arguments, this)
    if len(shells) != 1 or shells[0] not in SHELLS:
        given = " ".join(shells)
        raise ConfigError(f"expected a shell, got {given!r}{did_you_mean(given, SHELLS)}")
    script = SHELLS[shells[0]](words_of([*others, this]))
    console.print(script, end="", markup=False, highlight=False, soft_wrap=True, emoji=False)
    return DONE


def words_of(commands: Sequence[Command]) -> Words:
    """Return everything that can be typed, with the methods that are installed now."""
    values = {name: _plain(found) for name, found in _values(commands).items()}
    names = {command.name: _plain(_names(command)) for command in commands}
    known = {name: found for name, found in values.items() if found}
    return Words(_plain(sorted(command.name for command in commands)), names, known)


def _plain(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for word in dict.fromkeys(found) if _PLAIN.fullmatch(word))


def _names(command: Command) -> Iterator[str]:
    """Yield what can follow a command: words, names with their `=`, beginnings of dotted names, and flags."""
    names = list(command.names)
    if command.config is not None:
        names += _overrides(command.config)
    yield from command.choices()
    yield from (f"{name}=" for name in names)
    yield from (f"{name.split('.')[0]}." for name in names if "." in name)
    yield from command.flags
    yield "--help"


def _overrides(yaml: str) -> Iterator[str]:
    """Yield the groups, the names of values, and every field of a method."""
    from errata.benchmarks.bench.compose import compose
    from errata.cli.overrides import GROUPS

    values = compose(yaml, [])
    yield from (group for group in GROUPS if group in values or yaml == "bench")
    yield from _leaves(values)
    for config in _configs():
        yield from (f"editor.{name}" for name in _hints(config))


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        elif name != "name" or path == "model.":  # a group is chosen by the group's own name
            yield f"{path}{name}"


def _configs() -> list[type]:
    """Return the configurations of all methods that can be imported."""
    from errata import editors

    found = []
    for name in editors.METHODS:
        try:
            found.append(editors.get(name).Config)
        except ConfigError:
            continue  # `errata methods` shows why
    return found


def _values(commands: Sequence[Command]) -> dict[str, list[str]]:
    """Return what can follow the `=` of each name."""
    from errata import editors, models
    from errata.benchmarks.bench.config import BenchConfig
    from errata.cli.overrides import GROUPS, choices_of

    found = {group: [name for name in choices_of(group) if name != "custom"] for group in GROUPS}
    found["method"] = sorted(editors.METHODS)
    found["precision"] = list(models.DTYPES)
    found["device"] = ["cpu", "cuda"]
    for path, config in [("", BenchConfig), *(("editor.", config) for config in _configs())]:
        for name, choices in _choices(config, path):
            found[name] = [*found.get(name, ()), *choices]
    for option in (option for command in commands for option in command.options if option.choices):
        name = option.words[0].removesuffix("=")
        found[name] = [*found.get(name, ()), *option.choices]
    return found


def _choices(config: type, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields that take one of a few words, with these; also fields of the configurations inside."""
    from dataclasses import is_dataclass
    from typing import Literal, get_args, get_origin

    for name, hint in _hints(config).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and is_dataclass(kind):
                yield from _choices(kind, f"{path}{name}.")
            elif kind is bool:
                yield f"{path}{name}", ["true", "false"]
            elif get_origin(kind) is Literal:
                yield f"{path}{name}", [str(choice) for choice in get_args(kind)]


def _hints(config: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    from dataclasses import fields
    from typing import get_type_hints

    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}  # type: ignore[arg-type]

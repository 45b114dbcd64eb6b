"""`errata completion bash|zsh|fish`: a script that completes commands, names of overrides, and their values.

    eval "$(errata completion bash)"                                   in ~/.bashrc
    eval "$(errata completion zsh)"                                    in ~/.zshrc, behind compinit
    errata completion fish > ~/.config/fish/completions/errata.fish

The words are those of the Hydra tree and of the methods installed when the script is written: completing starts no
Python. Names below a dot (`dataset.path`) are offered once the dot is typed; a list behind a comma goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.cli.messages import asked_for_help
from errata.cli.shells import SHELLS, Words
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
eval "$(errata completion bash)"                                   in ~/.bashrc
eval "$(errata completion zsh)"                                    in ~/.zshrc, behind compinit
errata completion fish > ~/.config/fish/completions/errata.fish
"""
HYDRA_YAMLS = {"apply": "apply", "bench": "bench", "edit": "edit", "train": "train"}
# What may stand in a script unquoted, in every shell. Another package's method can be called anything.
_PLAIN = re.compile(r"[A-Za-z0-9_./=-]+")


def completion(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Print the script of a shell.

    Raises:
        ConfigError: no such shell.
    """
    if asked_for_help(arguments, HELP, console):
        return 0
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments)
        raise ConfigError(f"expected a shell, got {given!r}{did_you_mean(given, SHELLS)}")
    console.print(SHELLS[arguments[0]](words()), end="", markup=False, highlight=False, soft_wrap=True, emoji=False)
    return 0


def words() -> Words:
    """Everything that can be typed, as things are installed now."""
    from errata.cli.main import commands

    values = {name: _plain(found) for name, found in _values().items()}
    names = {command: _plain(found) for command, found in _names().items()}
    return Words(_plain(sorted(commands())), names, {name: found for name, found in values.items() if found})


def _plain(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for word in dict.fromkeys(found) if _PLAIN.fullmatch(word))


def _names() -> dict[str, list[str]]:
    from errata import editors
    from errata.cli import applying, assessing, converting, demonstration, edit_folders, exporting, reading
    from errata.playground import app

    options: dict[str, Iterable[str]] = {
        "ability": assessing.OPTIONS,
        "check": ("out", *edit_folders.OPTIONS),
        "export": exporting.OPTIONS,
        "merge": ("out", "prefer"),
        "playground": app.NAMES,
        "remove": ("id", "out"),
        "report": ("out",),
        **{command: _overrides(yaml) for command, yaml in HYDRA_YAMLS.items()},
    }
    found = {command: [f"{name}=" for name in names] for command, names in options.items()}
    found["edit"] += [f"{name}=" for name in demonstration.TEXTS]
    found["apply"] += [f"{name}=" for name in ("out", "force", *edit_folders.OPTIONS)]
    for command, names in found.items():
        found[command] = [*names, *dict.fromkeys(f"{name.split('.')[0]}." for name in names if "." in name)]
    found["convert"] = [*converting.OPTIONS, *(f"{name}=" for names in converting.OPTIONS.values() for name in names)]
    for command in HYDRA_YAMLS:
        found[command] += ["--help"] if command == "apply" else ["--help", "--cfg"]
    for command in ("compare", "status", "list", "diff", "ability"):
        found[command] = [*found.get(command, ()), reading.JSON]
    found["apply"] += [applying.DRY, applying.EMPTY]
    found["bench"].append("-m")
    return found | {"methods": sorted(editors.METHODS), "completion": list(SHELLS)}


def _overrides(yaml: str) -> Iterator[str]:
    """Groups, names of values, and every field of a method."""
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
    """The configurations of all methods that can be had."""
    from errata import editors

    found = []
    for name in editors.METHODS:
        try:
            found.append(editors.get(name).Config)
        except ConfigError:
            continue  # `errata methods` says what is wrong with it
    return found


def _values() -> dict[str, list[str]]:
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
    return found


def _choices(config: type, path: str) -> Iterator[tuple[str, list[str]]]:
    """Fields of a configuration that take one of a few words, those of the configurations in it too."""
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
    """Names and types of a dataclass's fields."""
    from dataclasses import fields
    from typing import get_type_hints

    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}  # type: ignore[arg-type]

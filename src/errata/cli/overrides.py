"""Translates the overrides of `errata bench`, `edit`, `train` and `apply` into Hydra's, with errors in one line.

In the values of Hydra, braces, commas and equals signs have a meaning, and a group takes only the name of a YAML. The
translation allows more:
- Values that are text (paths, names) are quoted, so that they arrive as they were typed.
- `model=some/folder` means `model=custom model.name=some/folder`.
- `editor=some.yaml`, a file with a method's name and fields, means `editor=NAME` and `editor.FIELD=VALUE` for each.
- `editor.v_lr=0.3` may name any field of the method, although no YAML lists it.
- `editor.layers=3,4` means `editor.layers=[3,4]` outside a sweep. The brackets would need quotes in zsh.
- The error for an unknown name suggests the nearest known one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from errata import editors
from errata.benchmarks.bench.compose import choices, compose, one_line, read_mapping
from errata.benchmarks.bench.defaults import ADDED
from errata.benchmarks.runs.hydra_grammar import TEXT_KEYS, quoted, written
from errata.editors.core.config import did_you_mean, nearest
from errata.editors.core.errors import ConfigError

GROUPS = ("editor", "model", "dataset", "protocol", "guard", "launcher", "experiment")
# Below these, any field can be named.
OPEN_KEYS = ("editor.", "model.editors.", "dataset.options.", "values.", "compose.compress.", "compose.unlearn.")
HYDRA = "hydra"
FILES = (".yaml", ".yml", ".json")


def translated(arguments: Sequence[str], config: str, *, sweep: bool = False, also: Sequence[str] = ()) -> list[str]:
    """Return overrides for Hydra.

    Args:
        arguments: `name=value` as typed.
        config: The YAML that they override: "bench", "edit", "train", "tune" or "apply".
        sweep: Whether commas separate the values of a sweep, in text too.
        also: Further names that the command knows, for "did you mean".

    Raises:
        ConfigError: An argument is no `name=value`, has an unknown name or an unknown choice of a group, or one name
            is given twice.
    """
    if not arguments:
        return []
    refuse_repeats(arguments, several="; for several runs give -m {name}=A,B" if config == "bench" else "")
    values = compose(config, [])
    known = _Known(sorted({*_names(values), *also}), values, _method(arguments, values))
    lines = [(argument, line) for argument in arguments for line in _translated(argument, known, sweep)]
    return [_readable(argument, line) for argument, line in lines]


def refuse_repeats(arguments: Sequence[str], *, several: str = "") -> None:
    """Refuse one name with two values, where the first would be lost.

    Args:
        arguments: `name=value` as typed.
        several: Advice for someone who wants both values, with {name} in it.

    Raises:
        ConfigError: A name is given twice, or an argument is no `name=value`.
    """
    seen: dict[str, str] = {}
    for argument in arguments:
        name = bare_name(split(argument)[0])
        if name in seen:
            both = f"{seen[name]} and {argument}"
            raise ConfigError(f"{name} is given twice, as {both}; leave one out{several.format(name=name)}")
        seen[name] = argument


def bare_name(name: str) -> str:
    """Return the name of an override without what Hydra's grammar puts around it."""
    return name.lstrip("+~").split("@")[0]


@dataclass(frozen=True)
class _Known:
    """What a command can be given: its names, their values by default, and the method that is chosen."""

    names: Sequence[str]
    values: Mapping[str, Any]
    method: str

    def takes_list(self, name: str) -> bool:
        """Return whether the field of this name holds a list."""
        if name.startswith("values."):
            return True
        if name.startswith(OPEN_KEYS):
            method, field = _method_field(name, self.method)
            return field in _list_fields(method)
        value: Any = self.values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return isinstance(value, list)

    def hint(self, name: str) -> str:
        """Return what was probably meant by an unknown name."""
        group = name.split(".")[0]
        near = [entry for entry in self.names if "." not in entry or entry.split(".")[0] == group]
        if (found := nearest(name, near)) is not None:
            return f"; did you mean {found!r}?"
        if (field := nearest(name.split(".")[-1], _fields(self.method))) is not None:
            return f"; did you mean 'editor.{field}'? The fields of a method begin with editor."
        return did_you_mean(name, near)


def _method(arguments: Sequence[str], values: Mapping[str, Any]) -> str:
    """Return the method that the overrides choose, or the command's own."""
    given = dict(split(argument) for argument in arguments)
    chosen = str(given.get("editor.name") or given.get("editor") or (values.get("editor") or {}).get("name", ""))
    return str(read_mapping(chosen).get("name")) if chosen.endswith(FILES) else chosen.split(",")[0].strip()


def _method_field(name: str, method: str) -> tuple[str, str]:
    """Return the method and its field that `editor.FIELD` or `model.editors.METHOD.FIELD` names."""
    first, *rest = name.removeprefix("model.").split(".")
    return (method, ".".join(rest)) if first == "editor" else (rest[0], ".".join(rest[1:]))


def _fields(method: str) -> list[str]:
    """Return the fields of a method; none where the name is no method's."""
    if method not in editors.METHODS:
        return []
    return [field.name for field in dataclasses.fields(editors.get(method).Config)]


def _list_fields(method: str) -> list[str]:
    """Return the fields of a method that hold lists."""
    if method not in editors.METHODS:
        return []
    hints = get_type_hints(editors.get(method).Config)
    return [name for name, hint in hints.items() if tuple in {get_origin(kind) for kind in (hint, *get_args(hint))}]


def _readable(argument: str, line: str) -> str:
    """Return the line, once Hydra's grammar can read it. One word for one name needs no look, nor Hydra's import."""
    if re.fullmatch(r"[A-Za-z_]+=[A-Za-z_]+", line):
        return line
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(line)
    except HydraException as error:
        raise ConfigError(f"{argument!r} cannot be read: {one_line(error)}; put quotes into the quotes") from error
    return line


def split(argument: str) -> tuple[str, str]:
    """Return the name and the value of one override.

    Raises:
        ConfigError: It has no `=`.
    """
    name, equals, value = argument.partition("=")
    if not equals or not name:
        raise ConfigError(f"expected name=value, got {argument!r}")
    return name, value


def choices_of(group: str) -> list[str]:
    """Return the names that a group can be given: its YAMLs, and what other packages register."""
    return sorted({*choices(group), *_registered(group)})


def _registered(group: str) -> Sequence[str]:
    """Return the names that a group has without a YAML."""
    if group == "editor":
        return editors.METHODS
    return ADDED[group].others() if group in ADDED else ()


def _translated(argument: str, known: _Known, sweep: bool) -> Iterator[str]:
    name, value = split(argument)
    bare = bare_name(name)
    if bare == f"{HYDRA}.sweeper" or bare.startswith(f"{HYDRA}.sweeper.params"):
        # The plan of a sweep is made from the values themselves. With these settings Hydra would launch other runs.
        raise ConfigError(f"{bare}: give the values themselves, as in -m editor=rome,memit")
    if bare.split("/")[0].split(".")[0] == HYDRA or "/" in bare:
        yield argument
    elif bare in GROUPS:
        yield from _choice(bare, value, sweep)
    elif bare.startswith(OPEN_KEYS) and bare not in ("editor.name",):
        yield f"++{bare}={_as_list(bare, value, known, sweep)}"
    elif bare not in known.names:
        raise ConfigError(f"unknown name {bare!r}{known.hint(bare)}")
    elif bare in TEXT_KEYS and value != "null":
        # All runs of a sweep go to one folder, so a comma in `out` separates nothing.
        parts = value.split(",") if sweep and bare != "out" else [value]
        yield f"{name}={','.join(map(quoted, parts))}"
    else:
        yield f"{name}={_as_list(bare, value, known, sweep)}"


def _as_list(name: str, value: str, known: _Known, sweep: bool) -> str:
    """Return a value with the brackets of a list, where commas separate the entries of one."""
    is_bare = "," in value and not sweep and value[0] not in "[{('\""
    return f"[{value}]" if is_bare and known.takes_list(name) else value


def _choice(group: str, value: str, sweep: bool) -> Iterator[str]:
    if group == "editor" and value.endswith(FILES):
        yield from _from_file(value)
        return
    there = choices_of(group)
    asked = [part.strip() for part in value.split(",")] if sweep else [value]
    strangers = [part for part in asked if part not in there]
    if not strangers and group == "editor" and any(part not in choices(group) for part in asked):
        # A method of another package has no YAML; it would hold nothing but the name.
        yield f"editor.name={value}"
    elif not strangers:
        yield f"{group}={value}"
    elif group != "model":
        hint = f" (a file is given as {group}.path=)" if group == "dataset" else ""
        hint += " (several values need -m)" if "," in value and not sweep else ""
        raise ConfigError(f"{group}: unknown choice {strangers[0]!r}{hint}{did_you_mean(strangers[0], there)}")
    elif len(strangers) < len(asked):
        raise ConfigError("model: sweep over named models or over folders and ids, not over both at once")
    else:
        yield "model=custom"
        yield f"model.name={','.join(map(quoted, asked))}"


def _from_file(path: str) -> Iterator[str]:
    """Yield the overrides of a YAML or JSON of a method, as `errata convert hparams` writes it."""
    fields = read_mapping(path)
    name = fields.pop("name", None)
    if name not in editors.METHODS:
        raise ConfigError(f"{path}: expected name: METHOD among its fields, got {name!r}")
    yield from _choice("editor", name, sweep=False)
    yield from (f"++editor.{field}={written(value)}" for field, value in fields.items())


def _names(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{path}{key}.")

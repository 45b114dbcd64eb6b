"""Translates the overrides of `errata bench`, `edit`, `train` and `apply` into Hydra's, with errors in one line.

In the values of Hydra, braces, commas and equals signs have a meaning, and a group takes only the name of a YAML. The
translation allows more:
- Values that are text (paths, names) are quoted, so that they arrive as they were typed.
- `model=some/folder` means `model=custom model.name=some/folder`.
- `editor=some.yaml`, a file with a method's name and fields, means `editor=NAME` and `editor.FIELD=VALUE` for each.
- `editor.v_lr=0.3` may name any field of the method, although no YAML lists it.
- The error for an unknown name suggests the nearest known one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata import editors
from errata.benchmarks.bench.compose import choices, compose, one_line, read_mapping
from errata.benchmarks.bench.defaults import ADDED
from errata.benchmarks.runs.hydra_grammar import TEXT_KEYS, quoted, written
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

GROUPS = ("editor", "model", "dataset", "protocol", "guard", "launcher", "experiment")
OPEN_KEYS = ("editor.", "model.editors.", "dataset.options.")  # below these, any field can be named
HYDRA = "hydra"
FILES = (".yaml", ".yml", ".json")


def translated(arguments: Sequence[str], config: str, *, sweep: bool = False, also: Sequence[str] = ()) -> list[str]:
    """Return overrides for Hydra.

    Args:
        arguments: `name=value` as typed.
        config: The YAML that they override: "bench", "edit", "train" or "apply".
        sweep: Whether commas separate the values of a sweep, in text too.
        also: Further names that the command knows, for "did you mean".

    Raises:
        ConfigError: An argument is no `name=value`, or has an unknown name or an unknown choice of a group.
    """
    values = compose(config, [])
    known = sorted({*_names(values), *also})
    lines = [(argument, line) for argument in arguments for line in _translated(argument, known, sweep)]
    return [_readable(argument, line) for argument, line in lines]


def _readable(argument: str, line: str) -> str:
    """Return the line, once Hydra's grammar can read it."""
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


def _translated(argument: str, known: Sequence[str], sweep: bool) -> Iterator[str]:
    name, value = split(argument)
    bare = name.lstrip("+~").split("@")[0]
    if bare == f"{HYDRA}.sweeper" or bare.startswith(f"{HYDRA}.sweeper.params"):
        # The plan of a sweep is made from the values themselves. With these settings Hydra would launch other runs.
        raise ConfigError(f"{bare}: give the values themselves, as in -m editor=rome,memit")
    if bare.split("/")[0].split(".")[0] == HYDRA or "/" in bare:
        yield argument
    elif bare in GROUPS:
        yield from _choice(bare, value, sweep)
    elif bare.startswith(OPEN_KEYS) and bare not in ("editor.name",):
        yield f"++{bare}={value}"
    elif bare not in known:
        top = [entry for entry in known if "." not in entry or bare.split(".")[0] == entry.split(".")[0]]
        raise ConfigError(f"unknown name {bare!r}{did_you_mean(bare, top)}")
    elif bare in TEXT_KEYS and value != "null":
        # All runs of a sweep go to one folder, so a comma in `out` separates nothing.
        parts = value.split(",") if sweep and bare != "out" else [value]
        yield f"{name}={','.join(map(quoted, parts))}"
    else:
        yield argument


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
        hint = f"; a file is given as {group}.path=" if group == "dataset" else ""
        hint += "; several values need -m" if "," in value and not sweep else ""
        raise ConfigError(f"{group}: unknown choice {strangers[0]!r}{did_you_mean(strangers[0], there)}{hint}")
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

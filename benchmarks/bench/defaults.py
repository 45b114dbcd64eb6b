"""The defaults of the commands, taken from their dataclasses: for Hydra to compose, and for `--help` to show.

The YAMLs in hparams/ name `bench_fields`, `dataset/fields` and the like in their defaults lists. No file holds these:
`register` puts them into Hydra's store, and with them what other packages add to the groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_type_hints

from errata.benchmarks.bench import edit_protocol
from errata.benchmarks.bench.config import (
    ApplyConfig,
    BenchConfig,
    DatasetConfig,
    EditConfig,
    GuardConfig,
    ModelConfig,
)
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.datasets import registry
from errata.editors.core.config_docs import documented
from errata.editors.core.extensions import ExtensionPoint

COMMANDS: Mapping[str, type] = MappingProxyType(
    {"bench": BenchConfig, "edit": EditConfig, "apply": ApplyConfig, "train": TrainConfig, "tune": TuneConfig}
)
ADDED: Mapping[str, ExtensionPoint] = MappingProxyType({"dataset": registry.ADDED, "protocol": edit_protocol.ADDED})
GROUPS: Mapping[str, type] = MappingProxyType({"dataset": DatasetConfig, "guard": GuardConfig, "model": ModelConfig})


def register() -> None:
    """Put the defaults into Hydra's store, as far as they are not there yet."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for path, node in stored().items():
        group, _, name = path.rpartition("/")
        store.store(group=group or None, name=name, node=node)


def stored() -> dict[str, dict[str, Any]]:
    """Return the defaults as files that hparams/ could hold: values by `name` or `group/name`."""
    found = {
        f"{command}_fields": field_defaults(config, leave_out=tuple(GROUPS)) for command, config in COMMANDS.items()
    }
    found |= {f"{group}/fields": field_defaults(config) for group, config in GROUPS.items()}
    for group, point in ADDED.items():
        fields = field_defaults(GROUPS[group]) if group in GROUPS else {}
        found |= {f"{group}/{name}": {**fields, "name": name} for name in point.others()}
    return found


def field_defaults(config: type, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the defaults of a configuration as plain values; fields without a default are left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name not in leave_out and (has_default := _default(field)):
            (value,) = has_default
            found[field.name] = _plain(value)
    return found


def _default(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    if field.default_factory is not dataclasses.MISSING:
        return (field.default_factory(),)
    return () if field.default is dataclasses.MISSING else (field.default,)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value, dict_factory=lambda pairs: {name: _plain(entry) for name, entry in pairs})
    return list(value) if isinstance(value, tuple) else value


def explained(command: str, values: Mapping[str, Any]) -> str:
    """Return the values of a command as YAML, with the meaning of each field in a comment.

    Args:
        command: "bench", "edit", "apply", "train" or "tune".
        values: As `compose` gives them.
    """
    lines = list(_lines(values, COMMANDS.get(command), ""))
    width = max((len(line) for line, meaning in lines if meaning and len(line) < 40), default=0)
    return "".join(f"{line:{width}}  # {meaning}\n" if meaning else f"{line}\n" for line, meaning in lines)


def _lines(values: Mapping[str, Any], config: type | None, indent: str) -> Iterator[tuple[str, str]]:
    """Yield each line of the YAML, and what its field means where that is known."""
    meanings: dict[str, str] = {}
    kinds: Mapping[str, Any] = GROUPS
    if config is not None and dataclasses.is_dataclass(config):
        meanings = {field.name: field.meaning.rstrip(".") for field in documented(config)}
        kinds = get_type_hints(config)
    for name in (*(name for name in kinds if name in values), *(name for name in values if name not in kinds)):
        value = values[name]
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:", meanings.get(name, "")
            yield from _lines(value, kinds.get(name), f"{indent}  ")
        else:
            first, *others = _as_yaml({name: value})
            yield f"{indent}{first}", meanings.get(name, "")
            yield from ((f"{indent}{line}", "") for line in others)


def _as_yaml(values: Mapping[str, Any]) -> list[str]:
    """Return lines of YAML that Hydra reads as these values. It reads 1e3 as a number, so such text is quoted."""
    import yaml

    class Written(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if _is_number(value) else None)

    Written.add_representer(str, text)
    return yaml.dump(values, Dumper=Written, allow_unicode=True, sort_keys=False).rstrip("\n").split("\n")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

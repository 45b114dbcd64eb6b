"""The Hydra tree in hparams/ as plain values: what can be chosen, and what a line of overrides makes of it."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.editors.core.errors import ConfigError
from errata.editors.core.files.plain_files import compose_yaml, read_bytes

HPARAMS = "errata.hparams"
_PLAIN = ("editor", "protocol")  # groups whose files have no defaults lists of their own


def choices(group: str) -> list[str]:
    """The YAMLs of a group; those of a folder in it as `folder/name`."""
    return sorted(_names_below(files(HPARAMS) / group))


def _names_below(folder: Traversable, above: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("_"):
            yield from _names_below(entry, f"{above}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield above + entry.name.removesuffix(".yaml")


def compose(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as plain values.

    Raises:
        ConfigError: Hydra cannot read the overrides; its first line says why.
    """
    chosen = _plain_choices(config, overrides)
    return _composed(config, overrides, with_hydra=False) if chosen is None else without_hydra(config, chosen)


def _plain_choices(config: str, overrides: Sequence[str]) -> dict[str, str] | None:
    """Return the file that is chosen per group, where overrides choose plain files and nothing else."""
    from yaml import safe_load

    chosen = {group: name for group, _, name in (override.partition("=") for override in overrides)}
    are_plain = all(group in _PLAIN and name in choices(group) for group, name in chosen.items())
    if len(chosen) < len(overrides) or not are_plain:
        return None
    if not chosen:
        return chosen
    listed = safe_load((files(HPARAMS) / f"{config}.yaml").read_text("utf-8")).get("defaults", ())
    own = {group for entry in listed if isinstance(entry, dict) for group in entry}
    return chosen if chosen.keys() <= own else None


def without_hydra(config: str, chosen: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """A command's configuration, read from its YAMLs without Hydra, whose import takes longer than all else that a help
    needs. Of Hydra's language this understands what the commands' own defaults lists use.

    Args:
        config: The command.
        chosen: The files of groups that are not those of the defaults list.
    """
    from errata.benchmarks.bench.defaults import stored

    values = _merged(files(HPARAMS), config, stored(), chosen=chosen)
    values.pop("hydra", None)
    return values


def _merged(
    folder: Traversable,
    name: str,
    stored: Mapping[str, Mapping[str, Any]],
    group: str = "",
    chosen: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The values of one YAML and of the files that its defaults list names, the later over the earlier ones."""
    from yaml import safe_load

    if (name_in_store := f"{group}{name}") in stored:
        return copy.deepcopy(dict(stored[name_in_store]))
    own: dict[str, Any] = safe_load((folder / f"{name}.yaml").read_text("utf-8"))
    values: dict[str, Any] = {}
    for entry in own.pop("defaults", ["_self_"]):
        if entry == "_self_":
            _merge(values, own)
        elif isinstance(entry, str):
            _merge(values, _merged(folder, entry, stored, group))
        elif (below := next(iter(entry))).split()[0] != "override" and entry[below] is not None:
            found = _merged(folder / below, chosen.get(below, entry[below]), stored, f"{below}/")
            _merge(values, {below: found} if found else {})
    return values


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def swept(overrides: Sequence[str]) -> list[str]:
    """The overrides with several values that an experiment brings along: its `hydra.sweeper.params`."""
    experiment = [line for line in overrides if line.split("=")[0].lstrip("+") == "experiment"]
    if not experiment:
        return []
    params = _composed("bench", experiment, with_hydra=True)["hydra"]["sweeper"]["params"] or {}
    return [f"{name}={value}" for name, value in params.items()]


def launcher_of(overrides: Sequence[str]) -> str:
    """The name of Hydra's launcher that a line of overrides chooses, itself or by its experiment.

    Raises:
        ConfigError: as `compose`.
    """
    return launching(overrides)[0]


def launching(overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The name of Hydra's launcher as `launcher_of` gives it, and its settings.

    Raises:
        ConfigError: as `compose`.
    """
    hydra = _composed("bench", overrides, with_hydra=True)["hydra"]
    return hydra["runtime"]["choices"]["hydra/launcher"], hydra["launcher"]


def _composed(config: str, overrides: Sequence[str], *, with_hydra: bool) -> dict[str, Any]:
    from hydra import compose as compose_with_hydra
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from errata.benchmarks.bench.defaults import register

    register()
    # Within a sweep Hydra is at work already, and would not begin a second time.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(HPARAMS, version_base="1.3"):
            found = compose_with_hydra(config, list(overrides), return_hydra_config=with_hydra)
            values = OmegaConf.to_container(found, resolve=not with_hydra)  # hydra.runtime is known only in a run
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error) + _missing_plugin(str(error))) from error
    finally:
        GlobalHydra.instance().hydra = outer
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file as plain values: nothing in it is resolved, and no tag of YAML makes an object.

    Raises:
        ConfigError: it cannot be read, or holds no fields.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = read_bytes(path).decode("utf-8")
        compose_yaml(text)  # refuses what grows when it is read
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: expected fields and values, got {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def _missing_plugin(message: str) -> str:
    """What to install, where Hydra does not know a launcher."""
    found = re.search(r"'hydra/launcher/(\w+)'", message)
    if found is None:
        return ""
    return "; pip install " + ("hydra-ray-launcher" if found[1] == "ray" else "-e '.[cluster]'")


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

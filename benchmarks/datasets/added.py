"""Call the reader of another package's dataset, and check what it returns before anything is edited."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errata.benchmarks.datasets.json_records import Loaded
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, DatasetError, ErrataError
from errata.evaluate.probes import Case

_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def read_added(
    reader: Callable[..., Loaded], described: str, path: str | Path | None, options: Mapping[str, Any]
) -> Loaded:
    """Return what a reader of another package reads.

    Args:
        reader: A function `read(path, **options) -> Loaded`. A path without a default must be given.
        described: How errors call the dataset.
        path: What the reader gets as a `Path`; None: its own default.
        options: Its other arguments, by name.

    Raises:
        ConfigError: The path is missing, or an option is missing or unknown.
        DatasetError: The reader fails, or what it returns is not what the contract says.
    """
    first, *others = inspect.signature(reader).parameters.values() or (None,)
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise ConfigError(f"{described}, takes no path; its first argument must be the path")
    if path is None and first.default is first.empty:
        raise ConfigError(f"dataset.path is missing: {described}, reads a file or a folder; give dataset.path=PATH")
    check_options(others, options, described)
    given = () if path is None else (Path(path),)
    try:
        loaded = reader(*given, **options)
    except ErrataError:
        raise
    except Exception as error:  # whatever the code of another package raises
        raise DatasetError(f"{described}, failed: {type(error).__name__}: {error}", path=path) from error
    _check(loaded, described, path)
    return loaded


def check_options(parameters: list[inspect.Parameter], options: Mapping[str, Any], described: str) -> None:
    """Refuse options that a reader does not take.

    Args:
        parameters: Those of the reader, without its path.
        options: By name.
        described: How errors call the dataset.

    Raises:
        ConfigError: An option is unknown (with the nearest), or one is missing.
    """
    named = {each.name: each for each in parameters if each.kind in _NAMED}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for name in options:
        if name not in named and not takes_any:
            hint = did_you_mean(name, named) if named else ""
            raise ConfigError(f"dataset.options.{name}: {described}, has no such option{hint}")
    missing = [name for name, each in named.items() if each.default is each.empty and name not in options]
    if missing:
        raise ConfigError(f"dataset.options.{missing[0]} is missing: {described}, needs it")


def _check(loaded: Any, described: str, path: str | Path | None) -> None:
    if not isinstance(loaded, Loaded):
        raise DatasetError(f"{described}, returned {type(loaded).__name__}; it must return Loaded", path=path)
    seen: set[str] = set()
    for index, case in enumerate(loaded.cases):
        if not isinstance(case, Case):
            raise DatasetError(
                f"{described}, returned {type(case).__name__} among its cases; each must be a Case",
                path=path,
                record=f"#{index}",
            )
        if not isinstance(case.id, str) or not case.id:
            raise DatasetError(f"expected a text, got {case.id!r}", path=path, record=f"#{index}", field="id")
        if case.id in seen:
            raise DatasetError(
                f"{described}, returned two cases with this id; give each its own",
                path=path,
                record=case.id,
                field="id",
            )
        seen.add(case.id)

"""Read the results of finished runs: one results.json for reports, or tables of many runs for pandas.

    runs = load_results("runs")     # one row per run: its settings and means

record_table.py reads what the runs recorded of every probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.run_folder import RESULTS, folder_of_runs
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.files import jsonl
from errata.editors.core.files.plain_files import read_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1  # of results.json
SEQUENCES = ("sequential", "batch", "dial", "league", "compose")
"""The protocols whose edits follow each other on one model."""
AT_ONCE = ("batch", "dial", "league", "compose")
"""Those of them that make all edits at once, whatever `batch_size` is."""
# The names of a run in its results.json, and the parts that hold numbers.
_NAMES = ("editor", "model", "dataset", "protocol")
_PARTS = ("counts", "summary", "before", "papers", "collapse", "speed", "writing")
# The other entries that reports read by name.
_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "config": ("seed", "confidence", "editor"),
        "digests": ("settings", "model", "cases"),
        "counts": ("edits", "failed", "disabling"),
        "summary": (),
        "before": (),
        "collapse": (
            *(f"{name}_{moment}" for name in ("perplexity", "fluency") for moment in ("before", "after")),
            *("perplexity_ratio", "perplexity_ratio_worst", "neighborhood_kl", "retention"),
        ),
        "speed": ("seconds_per_edit",),
        "versions": ("errata",),
        "machine": ("precision", "device"),
    }
)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without a torn last line; nothing is written.

    Raises:
        DatasetError: there is no such file, or a line before the last is not what was written.
    """
    if not path.exists():
        raise DatasetError("cannot be read: there is no such file", path=path)
    found = jsonl.read(path)
    if found.damage is not None:
        raise DatasetError(f"{found.damage}; run its command again, which makes it anew", path=path)
    return found.records


def read_curve(path: Path, *, is_sequence: bool) -> list[dict[str, Any]]:
    """Return the points of a curve.json; nothing where there is no such file.

    Args:
        path: The file.
        is_sequence: Whether its points are the checkpoints of a sequence, or else single edits.

    Raises:
        DatasetError: It is no JSON, or its points are not what was written.
    """
    if not path.is_file():
        return []
    needed = ("edits", "perplexity_ratio", "retention", "summary") if is_sequence else ("edit", "perplexity_ratio")
    try:
        points = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"is damaged: {error}; run its command again, which makes it anew", path=path) from error
    is_whole = isinstance(points, list) and all(isinstance(p, dict) and p.keys() >= {*needed} for p in points)
    if not is_whole or not all(_is_number(p[name]) for p in points for name in needed if name != "summary"):
        expected = f"expected a list of points with {', '.join(needed)}"
        raise DatasetError(f"is damaged: {expected}; run its command again, which makes it anew", path=path)
    return points


def _is_number(value: Any) -> bool:
    """Return whether a value is a number as JSON holds it: inf and nan are text, and a missing one is null."""
    try:
        number(value)
    except (TypeError, ValueError):
        return False
    return True


def load_results(folder: str | Path) -> pd.DataFrame:
    """Return the results of every finished run in a folder and below it, as a table.

    Args:
        folder: A run's folder, or any folder above.

    Returns:
        A pandas.DataFrame with one row per run. Columns: `run` (its folder), `editor`, `model`, `dataset`, `protocol`;
        every setting under its path, as in `config.seed`, `config.n_edits`, `config.batch_size`, `config.editor.layers`
        and `config.editor.v_lr`, with lists as tuples, so that `groupby` takes them; then every number of results.json
        under its path, as in `summary.probability.reliability.mean`. A setting that a run's method lacks is NaN.

    Raises:
        ConfigError: no such folder, or a results.json that is not one.
    """
    import pandas as pd

    rows = [_row(path) for path in sorted(folder_of_runs(folder).rglob(RESULTS))]
    return pd.DataFrame(rows)


def read_results(path: Path) -> dict[str, Any]:
    """Return one results.json, with everything that reports and comparisons read of it.

    Raises:
        ConfigError: not JSON, without the entries that every results.json has, or of another schema_version.
    """
    results = results_with_names(path)
    for part, names in _NEEDED.items():
        there = results.get(part)
        absent = [name for name in names if name not in there] if isinstance(there, Mapping) else [""]
        if absent:
            raise _no_results(path, f"{part}.{absent[0]}".rstrip("."))
    for part, kind in (("command", str), ("warnings", list)):
        if not isinstance(results.get(part), kind):
            raise _no_results(path, part)
    return results


def is_sequence(results: Mapping[str, Any]) -> bool:
    """Return whether the edits of a run followed each other on one model. Older results say so by their protocol."""
    return results.get("sequence", results["names"]["protocol"] in SEQUENCES)


def _no_results(path: Path, name: str) -> ConfigError:
    return ConfigError(f"{path} is no results file of errata: {name!r} is not what it is there")


def results_with_names(path: Path) -> dict[str, Any]:
    """Return one results.json after a check of its names and numbers alone."""
    try:
        results = read_json(path)
        version, names = results["schema_version"], results["names"]
        missing = [name for name in _NAMES if not isinstance(names[name], str)]
        missing += [name for name in _PARTS if not isinstance(results.get(name, {}), Mapping)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no results file of errata: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema_version {version!r}; this version of errata reads {SCHEMA_VERSION}")
    if missing:
        raise _no_results(path, missing[0])
    return results


def _row(path: Path) -> dict[str, Any]:
    results = results_with_names(path)
    row = named(path, results)
    for name, value in _settings(results.get("config", {}), "config"):
        row[name] = value
    for part in _PARTS:
        row.update(_flat(results.get(part, {}), part))
    return row


def named(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that say which run a row is from."""
    return {"run": str(path.parent), **{key: results["names"][key] for key in _NAMES}}


def _settings(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every setting with its path; lists become tuples, which pandas can group by."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _settings(entry, f"{path}.{name}")
    else:
        yield path, _hashable(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return tuple((name, _hashable(entry)) for name, entry in value.items()) if isinstance(value, Mapping) else value


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for name, entry in value.items() for key, leaf in _flat(entry, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {}
    return {path: number(value) if value in ("inf", "-inf", "nan") else value}

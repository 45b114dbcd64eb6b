"""How runs are told apart where several are shown together: groups that began alike, titles, labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks.runs.json_values import digest
from errata.benchmarks.runs.run_folder import slug

Results = Mapping[str, Any]

_NAMES = ("editor", "model", "dataset", "protocol")
# Settings that a name says already, or that change nothing that is measured.
_SILENT = ("out", "time_limit", "editor.name", "model.name", "dataset.name", "protocol.name", "model.editors")
_WRITTEN: Mapping[str, str] = MappingProxyType(
    {
        "rome": "ROME",
        "r_rome": "r-ROME",
        "c_rome": "C-ROME",
        "memit": "MEMIT",
        "emmet": "EMMET",
        "alphaedit": "AlphaEdit",
        "grace": "GRACE",
        "mend": "MEND",
        "ft_l": "FT-L",
        "ft_m": "FT-M",
        "lora": "LoRA",
    }
)
_MANY = 3  # settings that differ, beyond which a digest is shorter


def grouped(runs: Sequence[Results]) -> list[list[Results]]:
    """Runs that began alike: the same model said the same to the same probes."""
    groups: dict[str, list[Results]] = {}
    for run in runs:
        began = [run["names"][name] for name in ("model", "dataset", "protocol")]
        groups.setdefault(json.dumps([began, run["before"]]), []).append(run)
    return list(groups.values())


def title(run: Results) -> str:
    """Model, dataset and protocol of a run, and so of its group."""
    names = run["names"]
    return f"{Path(names['model']).name}, {names['dataset']}, {names['protocol']}"


def titles(groups: Sequence[Sequence[Results]]) -> list[str]:
    """One for each group; those of groups that would be called alike go on with what tells them apart."""
    plain = [title(group[0]) for group in groups]
    found = []
    for group, name in zip(groups, plain, strict=True):
        alike = [other[0] for other, its in zip(groups, plain, strict=True) if its == name]
        found.append(", ".join([name, *_settings(group[0], alike)]))
    return found


def file_names(titles: Sequence[str]) -> list[str]:
    """A name for files and anchors for each title, all of them distinct: of titles that are alike, or are cut to the
    same name, each goes on with a digest."""
    plain = [slug(title) for title in titles]
    often = Counter(map(str.lower, plain))  # a file system may not tell Aa from aA
    told = [[title, titles[:place].count(title)] for place, title in enumerate(titles)]
    return [
        name if often[name.lower()] == 1 else f"{name}-{digest(own)[:6]}" for name, own in zip(plain, told, strict=True)
    ]


def labels(runs: Sequence[Results]) -> list[str]:
    """What tells the runs apart: of editor, model, dataset and protocol those that differ; between runs that these
    leave alike, the settings that differ; a digest where none does, or too many do."""
    names = [name for name in _NAMES if len({run["names"][name] for run in runs}) > 1] or ["editor"]
    plain = [" ".join(str(run["names"][name]) for name in names) for run in runs]
    found = []
    for run, name in zip(runs, plain, strict=True):
        alike = [other for other, its in zip(runs, plain, strict=True) if its == name]
        found.append(" ".join([name, *_settings(run, alike)]))
    return found


def _settings(run: Results, alike: Sequence[Results]) -> list[str]:
    """What tells a run apart from those that are called like it."""
    if len(alike) < 2:
        return []
    own = [f"{name}={values[list(alike).index(run)]}" for name, values in differing(alike).items()]
    return own if 0 < len(own) <= _MANY else [run["digests"]["settings"][:6]]


def differing(runs: Sequence[Results]) -> dict[str, tuple[Any, ...]]:
    """Return settings that differ between the runs, with one value per run: {"batch_size": (1, 16)}."""
    settings = [dict(_flat(run.get("config", {}))) for run in runs]
    names = dict.fromkeys(name for found in settings for name in found)
    table = {name: tuple(found.get(name) for found in settings) for name in names if name not in _SILENT}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{path}{name}" not in _SILENT:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def readable(label: str) -> str:
    """A label with methods written as their papers write them; settings behind it stay as they are typed."""
    words = (word if "=" in word else _WRITTEN.get(word, word.replace("_", "-")) for word in label.split(" "))
    return " ".join(words)

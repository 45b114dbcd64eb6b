"""Tell runs apart where several are shown together: groups, replicates over seeds, their order, titles and labels."""

from __future__ import annotations

import itertools
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
# Settings that change between replicates of one run.
SEEDS = ("seed", "editor.seed")
# Settings that a name states already, or that change nothing that is measured.
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
        "ice": "ICE",
        "ike": "IKE",
        "scr": "SCR",
        "locft": "LocFT-BF",
        "ultraedit": "UltraEdit",
        "stableedit": "StableEdit",
        "wise": "WISE",
        "pmet": "PMET",
        "anyedit": "AnyEdit",
        "coachhook": "CoachHooK",
        "memoir": "MEMOIR",
        "crispedit": "CrispEdit",
        "coar": "COAR-Edit",
        "mint": "MINT",
        "malmen": "MALMEN",
        "rledit": "RLEdit",
    }
)
INTERVENTIONS: Mapping[str, str] = MappingProxyType(
    {
        "wanda": "Wanda",
        "sparsegpt": "SparseGPT",
        "gptq": "GPTQ",
        "awq": "AWQ",
        "rtn": "round to nearest",
        "torchao": "torchao",
        "rmu": "RMU",
        "ga": "gradient ascent",
        "gd": "gradient difference",
    }
)
_NO_ROW = (*_SILENT, *SEEDS)  # in which replicates may differ
_FIRST = ("batch_size",)  # the setting that is varied most often
_FOLLOWING = ("editor.seed",)  # it follows `seed`
_MANY = 3  # settings that differ, beyond which a digest is shorter


def grouped(runs: Sequence[Results]) -> list[list[Results]]:
    """Return the groups of runs that can stand in one table.

    Runs belong together if they began alike, because the same model gave the same answers to the same probes, or if
    they differ in their seed alone.
    """
    group_of: dict[str, int] = {}
    groups: dict[int, list[int]] = {}
    for index, run in enumerate(runs):
        names = [run["names"][name] for name in ("model", "dataset", "protocol")]
        keys = [json.dumps([names, run["before"]]), json.dumps([names, replicate_key(run)])]
        joined = sorted({group_of[key] for key in keys if key in group_of})
        own = joined[0] if joined else index
        groups[own] = sorted([*(i for each in joined for i in groups.pop(each)), index])
        group_of |= {key: own for key, group in group_of.items() if group in joined} | dict.fromkeys(keys, own)
    return [[runs[index] for index in group] for _, group in sorted(groups.items())]


def replicates(runs: Sequence[Results]) -> list[list[Results]]:
    """Return the runs in lists; those of one list differ in their seed alone."""
    found: dict[str, list[list[Results]]] = {}
    for run in runs:
        rows = found.setdefault(replicate_key(run), [])
        seed = _seeds(run)
        # The same seed twice is no replicate: it is the same run in two folders, or on two machines.
        row = next((row for row in rows if all(_seeds(other) != seed for other in row)), None)
        if row is None:
            rows.append([run])
        else:
            row.append(run)
    return sorted((row for rows in found.values() for row in rows), key=lambda row: runs.index(row[0]))


def _seeds(run: Results) -> list[Any]:
    settings = flat_settings(run.get("config", {}))
    return [settings.get(name) for name in SEEDS]


def replicate_key(run: Results) -> str:
    """Return a digest of everything that two runs have in common that differ in their seed alone."""
    settings = {name: value for name, value in flat_settings(run.get("config", {})).items() if name not in _NO_ROW}
    # The seed may choose the cases.
    inputs = {name: value for name, value in run["digests"].items() if name not in ("settings", "cases")}
    return digest([run["names"], settings, inputs])


def ordered(runs: Sequence[Results]) -> list[Results]:
    """Return the runs in the order in which they are shown.

    Methods come in one order everywhere, unknown ones last. Runs of one method come in the order of the settings that
    differ between them: numbers by their value, lists by their entries, other values by name.
    """
    names = [name for name in dict.fromkeys([*_FIRST, *differing(runs)]) if name not in SEEDS]
    methods = list(_WRITTEN)

    def key(run: Results) -> list[Any]:
        method, settings = run["names"]["editor"], flat_settings(run.get("config", {}))
        index = methods.index(method) if method in methods else len(methods)
        return [index, method, *(_sortable(settings.get(name)) for name in (*names, *SEEDS))]

    return sorted(runs, key=key)


def _sortable(value: Any) -> tuple[int, Any]:
    """Return what a value is sorted by: none, numbers, lists, then text."""
    if value is None:
        return 0, 0
    if isinstance(value, bool | int | float):
        return 1, float(value)
    if isinstance(value, list | tuple):
        return 2, [_sortable(entry) for entry in value]
    return 3, str(value)


def title(run: Results) -> str:
    """Return model, dataset and protocol of a run, and so of its group."""
    names = run["names"]
    return f"{Path(names['model']).name}, {names['dataset']}, {names['protocol']}"


def titles(groups: Sequence[Sequence[Results]]) -> list[str]:
    """Return one title per group; those that would be the same continue with the settings that tell them apart."""
    plain = [title(group[0]) for group in groups]
    found = []
    for group, name in zip(groups, plain, strict=True):
        alike = [other[0] for other, its in zip(groups, plain, strict=True) if its == name]
        found.append(", ".join([name, *_settings(group[0], alike)]))
    return found


def file_names(titles: Sequence[str]) -> list[str]:
    """Return a name for files and anchors for each title, all of them distinct.

    Titles that are the same, or that are cut to the same name, continue with a digest.
    """
    plain = [slug(title) for title in titles]
    often = Counter(map(str.lower, plain))  # a file system may not tell Aa from aA
    told = [[title, titles[:index].count(title)] for index, title in enumerate(titles)]
    return [
        name if often[name.lower()] == 1 else f"{name}-{digest(own)[:6]}" for name, own in zip(plain, told, strict=True)
    ]


def labels(runs: Sequence[Results]) -> list[str]:
    """Return what tells the runs apart, and nothing that is the same in all of them.

    These are editor, model, dataset and protocol where they differ, and between runs that have these in common the
    settings that differ. A digest stands where no setting differs, or too many do. A row over several seeds states
    their number.
    """
    names = [name for name in _NAMES if len({run["names"][name] for run in runs}) > 1]
    plain = [" ".join(str(run["names"][name]) for name in names) for run in runs]
    found = []
    for run, name in zip(runs, plain, strict=True):
        alike = [other for other, its in zip(runs, plain, strict=True) if its == name]
        settings = _settings(run, alike)
        first = name or ("" if any("=" in word for word in settings) else run["names"]["editor"])
        found.append(" ".join(word for word in (first, *settings, *_over_seeds(run)) if word))
    return found


def shared_method(runs: Sequence[Results]) -> str | None:
    """Return the method of runs that all have the same one, where their labels leave it out; else None."""
    methods = {run["names"]["editor"] for run in runs}
    is_left_out = len(runs) > 1 and len(methods) == 1 and next(iter(methods)) not in labels(runs)[0].split(" ")
    return readable(methods.pop()) if is_left_out else None


def _over_seeds(run: Results) -> list[str]:
    return [f"({run['seeds']} seeds)"] if run.get("seeds", 1) > 1 else []


def _settings(run: Results, alike: Sequence[Results]) -> list[str]:
    """Return the settings that tell a run apart from those that have the same name."""
    if len(alike) < 2:
        return []
    index = next(i for i, other in enumerate(alike) if other is run)
    differ = [(name, _without_folders(values)) for name, values in differing(alike).items() if name not in _FOLLOWING]
    own = [f"{_short(name)}={values[index]}" for name, values in differ]
    return own if 0 < len(own) <= _MANY else [run["digests"]["settings"][:6]]


def _without_folders(values: Sequence[Any]) -> Sequence[Any]:
    """Return the values with paths as the names of their files, if these tell them apart as well."""
    names = [Path(value).name if isinstance(value, str) and "/" in value else value for value in values]
    is_told = all((a == b) == (c == d) for (a, c), (b, d) in itertools.combinations(zip(values, names, strict=True), 2))
    return names if is_told else values


def _short(name: str) -> str:
    """Return a setting's name as a reader knows it: a field of the method without the word editor."""
    return name.removeprefix("editor.")


def differing(runs: Sequence[Results]) -> dict[str, tuple[Any, ...]]:
    """Return settings that differ between the runs, with one value per run: {"batch_size": (1, 16)}."""
    settings = [flat_settings(run.get("config", {})) for run in runs]
    names = dict.fromkeys(name for found in settings for name in found)
    table = {name: tuple(found.get(name) for found in settings) for name in names if name not in _SILENT}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {path: value} of a configuration: {"editor.layers": [3], "seed": 0}."""
    return dict(_flat(config))


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{path}{name}" not in _SILENT:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def readable(label: str) -> str:
    """Return a label with methods written as in their papers; the settings after it stay as they are typed."""
    words = (word if "=" in word else _WRITTEN.get(word, word.replace("_", "-")) for word in label.split(" "))
    return " ".join(words)

"""Datasets by name: `load("counterfact", path)` reads a real file, `load("world_counterfact")` the testbed's cases.

Another package adds a dataset by an entry point of the group `errata.datasets` (docs/adding-a-dataset.md). Its value is
a function `read(path, **options) -> Loaded`; added.py calls and checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from errata.benchmarks.datasets import published
from errata.benchmarks.datasets.added import read_added
from errata.benchmarks.datasets.json_records import Dropped, Loaded
from errata.benchmarks.datasets.published import BENCHMARKS, how_to_get
from errata.benchmarks.datasets.selection import Ids, OrderedIds, Selection, read_ids, select
from errata.editors.core.errors import ConfigError
from errata.editors.core.extensions import ExtensionPoint
from errata.evaluate.probes import Case

Name = Literal[
    "counterfact",
    "counterfact_plus",
    "zsre",
    "easyedit",
    "knowedit",
    "mquake",
    "rippleedits",
    "wikibigedit",
    "ultraeditbench",
    "qaedit",
    "fever",
    "unke",
    "akew",
    "conflictedit",
    "hallueditbench",
    "canonical",
    "world",
    "world_counterfact",
    "world_counterfact_plus",
    "world_zsre",
    "world_first",
    "world_again",
]
NAMES: tuple[Name, ...] = get_args(Name)
ADDED = ExtensionPoint(
    "errata.datasets",
    "dataset",
    "a function read(path, **options) -> Loaded",
    lambda loaded: callable(loaded) and not isinstance(loaded, type),
    own=NAMES,
)
# The testbed's datasets. "world_counterfact" and the like hold its facts in the schema of that dataset. "world_first"
# holds the cases whose subject is one token and stands first, where ROME can break a model; "world_again" its facts
# with every other answer in turn.
TESTBEDS: tuple[Name, ...] = tuple(name for name in NAMES if name.split("_")[0] == "world")
_FORMS: Mapping[str, str] = MappingProxyType(
    {
        "world": "world",
        "world_counterfact": "counterfact",
        "world_counterfact_plus": "counterfact_plus",
        "world_zsre": "zsre",
    }
)
# How the originals name their files, for a folder with several datasets. CounterFact+ uses CounterFact's records.
_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "counterfact": ("counterfact", "multi_counterfact"),
        "counterfact_plus": ("counterfact", "multi_counterfact"),
        "zsre": ("zsre_mend_eval", "zsre_mend"),
    }
)
_COUNTERFACT = "https://rome.baulab.info/data/dsets/counterfact.json"
# Where the original file of each dataset can be downloaded.
_SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "counterfact": _COUNTERFACT,
        "counterfact_plus": _COUNTERFACT,
        "zsre": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    }
)


def load(
    name: str,
    path: str | Path | None = None,
    *,
    target: Literal["answers", "alt"] | None = None,
    split: Literal["dev", "test"] | None = None,
    limit: int | None = None,
    ids: Ids | None = None,
    seed: int | None = None,
    order: Literal["ids"] | None = None,
    options: Mapping[str, Any] | None = None,
    needs_subject: bool = True,
    chat: bool = False,
) -> Loaded:
    """Return the cases of a dataset.

    Args:
        name: One of NAMES, or a dataset of another package.
        path: A file in the dataset's original schema, a folder that holds it under its original name, or a dataset of
            the Hub (`owner/name:config:split`). For TESTBEDS the folder of a testbed that its recipe has made; None:
            the bundled testbed.
        target: What a zsRE edit teaches (see `zsre.load`); None: "answers". The others have one answer.
        split: Only one half of the testbed's cases: settings are chosen on "dev" and reported on "test".
        limit: The largest number of cases.
        ids: Only these case ids, or those in a JSON file.
        seed: Shuffle first; None keeps the order.
        order: "ids": the cases in the order of `ids`; None: in that of the file.
        options: What a dataset takes besides its path: a published benchmark (docs/benchmarks.md) or one of another
            package.
        needs_subject: Drop records without a subject; False: keep them, for methods that never look at it.
        chat: Read every prompt as a message to an instruct model, inside its chat template.

    Raises:
        ConfigError: There is no such dataset or option, no path where one is needed, a target that the dataset cannot
            have, or the folder is no testbed.
        DatasetError: As the dataset's own loader.
    """
    _refuse_misfits(name, target, split, options)
    selection = _selection(limit, ids, seed, order)
    if name in TESTBEDS:
        found = _from_testbed(name, path, split, selection)
    elif _is_original(name):
        found = _from_file(name, path, target or "answers", selection, needs_subject=needs_subject)
    else:
        found = select(_by_options(name, path, options or {}, needs_subject=needs_subject), selection, path=path)
    return replace(found, cases=[_in_chat(case) for case in found.cases]) if chat else found


def _refuse_misfits(name: str, target: str | None, split: str | None, options: Mapping[str, Any] | None) -> None:
    """Refuse arguments that this dataset does not take."""
    if target is not None and name != "zsre":
        raise ConfigError(f"dataset.target is for zsre, whose records have two answers; leave it out of {name}")
    if options and (name in TESTBEDS or _is_original(name)):
        raise ConfigError(f"dataset.options: the dataset {name!r} takes none, got {', '.join(map(str, options))}")
    if split is not None and name not in TESTBEDS and name in (*NAMES, *ADDED.others()):
        raise ConfigError("only the testbed's cases have a split; leave it out, or give the ids to take")


def _is_original(name: str) -> bool:
    """Return whether the dataset is a file of CounterFact, of zsRE or in EasyEdit's flat form."""
    return name in _FILES or name == "easyedit"


def _selection(limit: int | None, ids: Ids | None, seed: int | None, order: str | None) -> Selection:
    """Return which cases to take, and in what order."""
    if order is None:
        return Selection(limit, ids, seed)
    if ids is None or seed is not None:
        raise ConfigError("dataset.order=ids needs dataset.ids and goes without dataset.shuffle")
    return Selection(limit, OrderedIds(read_ids(ids)), seed)


def _by_options(name: str, path: str | Path | None, options: Mapping[str, Any], *, needs_subject: bool) -> Loaded:
    """Return what a published benchmark or another package's dataset holds."""
    if name in BENCHMARKS:
        if path is None:
            raise ConfigError(how_to_get(name))
        return published.read(name, _in_folder(name, Path(path)), options, needs_subject=needs_subject)
    read = read_added(ADDED.load(name), ADDED.described(name), path, options)
    return _with_subjects(read) if needs_subject else read


def _from_file(
    name: str,
    path: str | Path | None,
    target: Literal["answers", "alt"],
    selection: Selection,
    *,
    needs_subject: bool,
) -> Loaded:
    """Return the cases of a file of CounterFact, of zsRE or in EasyEdit's flat form."""
    if path is None:
        raise ConfigError(_needs_a_file(name))
    path, limit, ids, seed = _in_folder(name, Path(path)), selection.limit, selection.ids, selection.seed
    if name == "zsre":
        from errata.benchmarks.datasets import zsre

        return zsre.load(path, target=target, limit=limit, ids=ids, seed=seed, needs_subject=needs_subject)
    if name == "easyedit":
        from errata.benchmarks.datasets import easyedit

        return easyedit.load(path, limit=limit, ids=ids, seed=seed, needs_subject=needs_subject)
    from errata.benchmarks.datasets import counterfact

    form = cast(counterfact.Form, name)
    return counterfact.load(path, form=form, limit=limit, ids=ids, seed=seed, needs_subject=needs_subject)


def _in_chat(case: Case) -> Case:
    """Return the case with every prompt read as a message of a chat."""
    probes = tuple(replace(probe, chat=True) for probe in case.probes)
    first, *further = (replace(request, chat=True) for request in case.requests)
    return replace(case, request=first, further=tuple(further), probes=probes)


def _with_subjects(loaded: Loaded) -> Loaded:
    """Return what was loaded with the cases that have a subject; the others are named among the dropped."""
    kept = [case for case in loaded.cases if all(request.subject is not None for request in case.requests)]
    names = {case.id for case in kept}
    lacking = [case.id for case in loaded.cases if case.id not in names]
    dropped = [Dropped(name, "subject", "the method edits at the subject, and there is none") for name in lacking]
    return replace(loaded, cases=kept, dropped=[*loaded.dropped, *dropped])


def _needs_a_file(name: str) -> str:
    """Return where the file of a dataset can be had, and what to type."""
    source = _SOURCES.get(name)
    if source is None:
        return f"dataset.path is missing: {name!r} reads a file in EasyEdit's flat form; give dataset.path=FILE"
    return (
        f"dataset.path is missing: {name!r} reads the original file; download {source} and give dataset.path=FILE; "
        f"dataset=world_{name} has the testbed's facts in this form"
    )


def _in_folder(name: str, path: Path) -> Path:
    """Return the dataset's file in a folder, by the names that the originals give it."""
    if not path.is_dir():
        return path
    stems = BENCHMARKS[name].files if name in BENCHMARKS else _FILES.get(name, (name,))
    wanted = [f"{stem}.json{end}" for stem in stems for end in ("", ".gz")]
    found = [path / file for file in wanted if (path / file).is_file()]
    if not found and name in BENCHMARKS and BENCHMARKS[name].reads_folders:
        return path
    if not found:
        raise ConfigError(f"no file of {name} in the folder {path}: expected one of {', '.join(wanted)}")
    return found[0]


def has_halves(name: str) -> bool:
    """Return whether the cases are a testbed's, which are split into halves by their subjects."""
    return name in TESTBEDS


def _from_testbed(
    name: str, path: str | Path | None, split: Literal["dev", "test"] | None, selection: Selection
) -> Loaded:
    from errata.benchmarks.datasets import world

    folder = world.BUNDLED if path is None else Path(path)
    if not world.is_testbed(folder):
        raise ConfigError(f"{folder} is no testbed: expected a folder as errata.benchmarks.testbed.train makes it")
    if name == "world_first":
        return select(Loaded(world.first_position_cases(folder, split=split)), selection)
    if name == "world_again":
        return select(Loaded(world.again_cases(folder, split=split)), selection)
    return select(Loaded(world.cases(folder, form=cast(world.Form, _FORMS[name]), split=split)), selection)

"""Datasets by name: `load("counterfact", path)`; without a path, the testbed's own cases in that form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from errata.benchmarks.records import Ids, Loaded, Selection, choose, select
from errata.editors.core.errors import ConfigError

Name = Literal["counterfact", "counterfact_plus", "zsre", "easyedit", "world"]
NAMES: tuple[Name, ...] = ("counterfact", "counterfact_plus", "zsre", "easyedit", "world")


def load(
    name: str,
    path: str | Path | None = None,
    *,
    target: Literal["answers", "alt"] = "answers",
    limit: int | None = None,
    ids: Ids | None = None,
    seed: int | None = None,
) -> Loaded:
    """The cases of a dataset.

    Args:
        name: One of NAMES.
        path: A file in the dataset's original schema. None: the bundled testbed's cases in that form ("world" has no
            other source, "easyedit" none but a file).
        target: What a zsRE edit teaches (see `zsre.load`); the others have one answer.
        limit: At most so many cases.
        ids: Only these case ids, or those in a JSON file.
        seed: Shuffle first; None keeps the order.

    Raises:
        ConfigError: no such dataset, a path where none belongs, or none where one is needed.
        DatasetError: as the dataset's own loader.
    """
    choose(name, NAMES, "the dataset")
    if path is None:
        return _from_testbed(name, Selection(limit, ids, seed))
    if name == "world":
        raise ConfigError("the dataset 'world' comes with the package; leave the path out, or name the file's format")
    if name == "zsre":
        from errata.benchmarks import zsre

        return zsre.load(path, target=target, limit=limit, ids=ids, seed=seed)
    if name == "easyedit":
        from errata.benchmarks import easyedit

        return easyedit.load(path, limit=limit, ids=ids, seed=seed)
    from errata.benchmarks import counterfact

    return counterfact.load(path, form=cast(counterfact.Form, name), limit=limit, ids=ids, seed=seed)


def _from_testbed(name: str, selection: Selection) -> Loaded:
    if name == "easyedit":
        raise ConfigError("the dataset 'easyedit' needs a path: a file in EasyEdit's flat form")
    from errata.benchmarks import world

    cases = world.cases() if name == "world" else world.cases(form=name)
    return select(Loaded(list(cases)), selection)

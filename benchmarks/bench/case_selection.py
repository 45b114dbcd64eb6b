"""Which cases of its dataset a run edits, chosen without the model; known_facts.py chooses with it."""

from __future__ import annotations

import dataclasses
from typing import Any

from errata import editors
from errata.benchmarks.bench import sequences
from errata.benchmarks.bench.config import BenchConfig, editor_name
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.datasets.references import References, with_essence
from errata.benchmarks.datasets.selection import without_conflicts
from errata.benchmarks.runs.json_values import digest
from errata.editors.core.errors import DatasetError
from errata.evaluate.priming import PRIMING
from errata.evaluate.priming_prompts import PromptPool
from errata.evaluate.probes import Case


def candidates(config: BenchConfig) -> Loaded:
    """The dataset's cases; as many as can be edited, where that can be said before they are looked at."""
    is_plain = not _has_conflicts(config) and config.dataset.known is None
    loaded = _load(
        config,
        limit=config.n_edits if is_plain else None,
        ids=config.dataset.ids,
        seed=config.seed if config.dataset.shuffle else None,
        order=config.dataset.order,
        needs_subject=editors.get(editor_name(config.editor)).needs_subject,
    )
    if config.dataset.probes is not None:
        fewer = [_asked_less(case, config.dataset.probes) for case in loaded.cases]
        loaded = dataclasses.replace(loaded, cases=fewer)
    return _with_essence(config, loaded)


def _load(config: BenchConfig, **chosen: Any) -> Loaded:
    """Read the dataset, all of it or the cases that are chosen; arguments as of `registry.load`."""
    return datasets.load(
        config.dataset.name,
        config.dataset.path,
        target=config.dataset.target,
        split=config.dataset.split,
        options=config.dataset.options or None,
        chat=config.dataset.chat,
        **chosen,
    )


def with_priming(config: BenchConfig, taken: Loaded) -> Loaded:
    """The cases with the prompts at which priming is measured, where the run measures it.

    Prompts are from all records of the dataset, so that those of single edits depend neither on how many are edited nor
    on the method. In a sequence no prompt mentions a subject that it edits.

    Raises:
        DatasetError: the records have no such prompts.
    """
    n = config.priming.n_prompts
    if not n:
        return taken
    subjects = set().union(*(case.subjects for case in taken.cases)) if is_sequence(config.protocol.name) else ()
    pool = PromptPool(_load(config, needs_subject=False).cases, subjects)
    cases = [pool.with_probes(case, n) for case in taken.cases]
    if not any(probe.kind == PRIMING for case in cases for probe in case.probes):
        raise DatasetError(
            "expected neighbourhood prompts, open prompts or relations with answers in common, at which priming can be "
            f"measured, got none in the records of {config.dataset.name}; leave priming.n_prompts out",
            path=config.dataset.path,
        )
    return dataclasses.replace(taken, cases=cases)


def _asked_less(case: Case, most: int) -> Case:
    """Return the case with the first `most` probes of each kind; a test counts as one and stays whole, or goes."""
    counted: dict[str, dict[str | int, None]] = {}
    for place, probe in enumerate(case.probes):
        if probe.kind != "condition":
            counted.setdefault(probe.kind, {})[probe.test or place] = None
    kept = {name for units in counted.values() for name in list(units)[:most]}
    return dataclasses.replace(
        case,
        probes=tuple(p for place, p in enumerate(case.probes) if (p.test or place) in kept),
    )


def _with_essence(config: BenchConfig, loaded: Loaded) -> Loaded:
    """The cases with texts about their subjects, where the run has reference texts."""
    if config.dataset.references is None or all(case.reference is None for case in loaded.cases):
        return loaded
    references = References.read(config.dataset.references)
    return dataclasses.replace(loaded, cases=[with_essence(case, references) for case in loaded.cases])


def _has_conflicts(config: BenchConfig) -> bool:
    """Whether a second edit of a prompt is one too many."""
    return is_sequence(config.protocol.name) and not config.dataset.repeats


def take(config: BenchConfig, candidates: Loaded) -> Loaded:
    """The first cases that one run can edit, at most `n_edits`."""
    if _has_conflicts(config):
        return without_conflicts(candidates, config.n_edits)
    return dataclasses.replace(candidates, cases=candidates.cases[: config.n_edits])


def require_enough(config: BenchConfig, candidates: Loaded) -> Loaded:
    """The cases, once there are `n_edits`.

    Raises:
        DatasetError: there are fewer.
    """
    if config.n_edits is not None and len(candidates.cases) < config.n_edits:
        raise DatasetError(
            f"n_edits={config.n_edits}, but only {len(candidates.cases)} cases can be had", path=config.dataset.path
        )
    return candidates


def without_other_subjects(config: BenchConfig, candidates: Loaded) -> tuple[Loaded, int]:
    """The cases to edit, and how many of their probes are left out since they are about another edit's subject."""
    if not is_sequence(config.protocol.name):
        return candidates, 0
    kept = sequences.without_edited_subjects(candidates.cases)
    left_out = sum(len(case.probes) for case in candidates.cases) - sum(len(case.probes) for case in kept)
    return dataclasses.replace(candidates, cases=kept), left_out


def digest_of(candidates: Loaded) -> str:
    """Digest of everything that is edited and asked."""
    cases, canonical = [case.as_dict() for case in candidates.cases], candidates.canonical
    return digest(cases if canonical is None else [cases, canonical.as_dict()])

"""`dataset.probes`: fewer questions per case, for models on which every answer is dear."""

from __future__ import annotations

from collections import Counter

import pytest

from errata.benchmarks.bench import case_selection
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.preparation import prepare
from errata.benchmarks.datasets.json_records import Loaded
from errata.editors.core.errors import ConfigError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe


def config(**dataset: object) -> BenchConfig:
    return BenchConfig.of(
        {
            "editor": {"name": "grace"},
            "model": {"name": "world"},
            "dataset": {"name": "world_counterfact_plus", **dataset},
            "n_edits": 3,
        }
    )


def test_the_first_probes_of_each_kind_are_asked_and_the_others_are_not() -> None:
    whole, fewer = (case_selection.candidates(config(probes=probes)).cases for probes in (None, 2))
    assert [case.id for case in whole] == [case.id for case in fewer]
    for before, after in zip(whole, fewer, strict=True):
        assert max(Counter(probe.kind for probe in before.probes).values()) > 2
        for kind in {probe.kind for probe in before.probes}:
            assert [p for p in after.probes if p.kind == kind] == [p for p in before.probes if p.kind == kind][:2]


def test_a_test_of_several_probes_stays_whole_with_its_conditions_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def tested(kind: str, test: str) -> tuple[Probe, Probe]:
        return Probe(kind, f"{kind} 1 of {test}", "a", test=test), Probe(kind, f"{kind} 2 of {test}", "a", test=test)

    probes = (*tested("portability", "one"), *tested("condition", "one"), *tested("portability", "two"))
    probes += (*tested("condition", "two"), Probe("rewrite", "r", "a"))
    case = Case("1", EditRequest("{} is", "X", "a"), probes)
    monkeypatch.setattr(case_selection.datasets, "load", lambda *_, **__: Loaded([case]))
    [fewer] = case_selection.candidates(config(probes=1)).cases
    assert fewer.probes == (*probes[:4], probes[-1])


def test_fewer_probes_make_another_run_and_none_are_refused() -> None:
    assert len({prepare(config(probes=probes)).folder.path.name for probes in (None, 2, 3)}) == 3
    with pytest.raises(ConfigError, match=r"dataset\.probes: expected at least 1, got 0"):
        config(probes=0)

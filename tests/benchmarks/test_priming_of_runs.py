"""A run that measures priming: what its records and results hold, and that other runs are as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.reports import comparing, tables
from errata.benchmarks.reports.report import read
from errata.benchmarks.runs import priming_summary
from errata.benchmarks.runs.results import read_records, read_results
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate.priming_prompts import PromptPool

pytestmark = pytest.mark.usefixtures("_nothing_drawn")


def config(out: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "ft_m", "num_steps": 3},
        "model": {"name": "world"},
        "dataset": {"name": "world_counterfact", "shuffle": True, "probes": 3},
        "device": "cpu",
        "n_edits": 4,
        "out": str(out),
        "priming": {"n_prompts": 2},
        "generation": {"tokens": 0, "fluency_tokens": 0},
        "collapse": {"n_texts": 0, "known_facts": 0},
    }
    return BenchConfig.of({**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.run(config(tmp_path_factory.mktemp("runs")))


def test_results_hold_memorization_and_priming_with_intervals(folder: Path) -> None:
    found = read_results(folder / "results.json")["priming"]
    assert found["memorization"]["log10_s"]["n"] == 4
    assert found["memorization"]["log10_s"]["mean"] > 0.5
    assert found["priming"]["prompts"] == sum(found[place]["prompts"] for place in ("subjects", "openings")) + (
        found.get("relations", {}).get("prompts", 0)
    )
    records = read_records(folder / "records.jsonl")
    each = [priming_summary.of_record(record) for record in records]
    logs = [one.priming.log10_s for one in each if one is not None and one.priming is not None]
    assert found["priming"]["log10_s"]["mean"] == pytest.approx(math.fsum(logs) / len(logs))
    assert found["rarity"]["n"] == 4
    asked = [probe for record in records for probe in record["probes"] if probe["kind"] == "priming"]
    assert all(len(probe["after"]["target_correct"]) == 1 and probe["after"]["text"] is None for probe in asked)


def test_tables_and_comparisons_have_both(folder: Path) -> None:
    rows = tables.damage([read(folder)])
    assert rows["priming, log10"][0].count(" to ") == 1
    (record, *_) = read_records(folder / "records.jsonl")
    values = comparing.values_of(record)["damage"]
    found = priming_summary.of_record(record)
    assert found is not None
    assert values["memorization"] == found.memorization.log10_s


def test_an_edit_that_is_refused_primes_nothing(folder: Path) -> None:
    record = dict(read_records(folder / "records.jsonl")[0])
    record["probes"] = [{**probe, "after": None} for probe in record["probes"]]
    assert priming_summary.values(record) == {"memorization": 0.0, "priming": 0.0}
    assert "priming" not in tables.damage([{**read(folder), "priming": {}}])


def test_a_run_that_does_not_ask_for_it_is_the_run_that_it_was(tmp_path: Path) -> None:
    without, plain = (bench.prepare(config(tmp_path, priming={"n_prompts": n})) for n in (2, 0))
    assert "priming" not in plain.settings["config"]
    assert without.folder.key != plain.folder.key
    assert not any(probe.kind == "priming" for case in plain.cases for probe in case.probes)
    with pytest.raises(ConfigError, match=r"priming\.n_prompts"):
        config(tmp_path, priming={"n_prompts": -1})


def test_prompts_do_not_depend_on_the_method_or_the_number_of_edits(tmp_path: Path) -> None:
    few, many = (bench.prepare(config(tmp_path, n_edits=n, editor={"name": e})) for n, e in ((2, "ft_l"), (4, "grace")))
    assert few.cases == many.cases[:2]


def test_a_sequence_is_asked_nothing_about_its_other_subjects(tmp_path: Path) -> None:
    changes = {"protocol": {"name": "sequential"}, "n_edits": 6}
    made = bench.prepare(config(tmp_path, **changes))
    subjects = {subject for case in made.cases for subject in case.subjects}
    asked = [probe.prompt for case in made.cases for probe in case.probes if probe.kind == "priming"]
    assert asked
    assert not [prompt for prompt in asked if any(subject in prompt for subject in subjects)]


def test_records_without_such_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptPool, "with_probes", lambda _, case, n: case if n else None)
    with pytest.raises(DatasetError, match=r"leave priming\.n_prompts out"):
        bench.prepare(config(tmp_path))

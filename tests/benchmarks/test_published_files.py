"""Published benchmarks from their files: of the Hub, in a folder, the original ones; and a run of each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# Those whose published records name no subject.
from published_files import NO_OPTIONS, QUICK_ROME, RUNS, load, run_values, written
from published_records import (
    QAEDIT,
    RECORDS,
    WIKIBIGEDIT,
)

from errata.benchmarks import bench
from errata.benchmarks.bench import case_selection
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import hub_records
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.published import BENCHMARKS
from errata.benchmarks.reports import publish, tables
from errata.cli.overrides import translated
from errata.editors import subject_free
from errata.editors.core.errors import ConfigError, DatasetError

# --- the Hub ------------------------------------------------------------------------------------------------------


def test_a_dataset_of_the_hub_works_as_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets as package

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, *, split: str, data_files: str | None = None) -> Any:
        asked.append((path, name, split, data_files))
        if path == "no/where":
            raise ConnectionError("offline")
        return package.Dataset.from_list([WIKIBIGEDIT])

    monkeypatch.setattr(package, "load_dataset", load_dataset)
    (case,) = datasets.load("wikibigedit", "lukasthede/WikiBigEdit").cases
    assert case.request.target == "Brast"
    datasets.load("wikibigedit", "lukasthede/WikiBigEdit:20240201:test")
    datasets.load("wikibigedit", "lukasthede/WikiBigEdit:data/one.json")
    assert asked == [
        ("lukasthede/WikiBigEdit", None, "train", None),
        ("lukasthede/WikiBigEdit", "20240201", "test", None),
        ("lukasthede/WikiBigEdit", None, "train", "data/one.json"),
    ]
    with pytest.raises(DatasetError, match=r"cannot be had from the Hub \(ConnectionError: offline"):
        datasets.load("wikibigedit", "no/where")
    assert not hub_records.is_named(tmp_path / "file.json")
    assert not hub_records.is_named("folder/file.json")


def test_a_folder_holds_a_benchmark_under_its_original_name(tmp_path: Path) -> None:
    path = written("qaedit", [QAEDIT], tmp_path)
    path.rename(tmp_path / "QAEdit.json")
    assert len(datasets.load("qaedit", tmp_path).cases) == 1
    with pytest.raises(ConfigError, match=r"expected one of recent_test\.json"):
        datasets.load("knowedit", tmp_path)


def test_cases_come_in_the_order_of_their_ids_where_that_is_asked(tmp_path: Path) -> None:
    path = written("qaedit", [{**QAEDIT, "id": i} for i in range(4)], tmp_path)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(["NQ-3", "NQ-0", "NQ-2"]), encoding="utf-8")
    plain = datasets.load("qaedit", path, ids=ids)
    assert [case.id for case in plain.cases] == ["NQ-0", "NQ-2", "NQ-3"]
    ordered = datasets.load("qaedit", path, ids=ids, order="ids", limit=2)
    assert [case.id for case in ordered.cases] == ["NQ-3", "NQ-0"]
    with pytest.raises(ConfigError, match=r"needs dataset\.ids and goes without dataset\.shuffle"):
        datasets.load("qaedit", path, order="ids")


def test_the_commands_of_the_page_read_their_datasets(tmp_path: Path) -> None:
    """docs/benchmarks.md"""
    page = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("errata ")]
    assert len(lines) == 2
    for line in lines:
        config = BenchConfig.of(compose("bench", translated(line.split()[2:], "bench")))
        path = written(config.dataset.name, RECORDS[config.dataset.name], tmp_path)
        config = replace(config, dataset=replace(config.dataset, path=str(path)))
        assert case_selection.candidates(config).cases


def test_results_count_what_was_dropped_for_want_of_a_subject_and_name_methods_that_keep_it(tmp_path: Path) -> None:
    unknown = {**QAEDIT, "id": 4, "subject": None}
    path = written("qaedit", [QAEDIT, unknown], tmp_path)
    values = {**run_values("qaedit", path, tmp_path), "editor": {"name": "rome", **QUICK_ROME}}
    folder = bench.run(BenchConfig.of(values))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (results["counts"]["edits"], results["counts"]["dropped_without_subject"]) == (1, 1)
    assert [entry["record"] for entry in results["dropped"]] == ["4"]
    (warning,) = [text for text in results["warnings"] if "edits at the subject" in text]
    assert f"methods that keep such records: {', '.join(subject_free())}" in warning
    assert "ft_l, ft_m, grace" in warning


# --- the original files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "options", "needs_subject", "read", "dropped"),
    [
        ("mquake", "akew_mquake_cf.json.gz", {}, True, 236, 0),
        ("akew", "akew_mquake_cf.json.gz", {}, True, 236, 0),
        ("akew", "akew_mquake_cf.json.gz", {"teaches": "triplets"}, True, 236, 0),
        ("wikibigedit", "wikibigedit_3k.json.gz", {}, True, 2400, 0),
        ("qaedit", "qaedit_1k.json.gz", {}, True, 797, 3),
        ("qaedit", "qaedit_1k.json.gz", {}, False, 800, 0),
        ("unke", "unke_v2.json.gz", {}, False, 400, 0),
        ("conflictedit", "conflict_coverage_edit.json.gz", {}, True, 400, 0),
        ("conflictedit", "conflict_reverse_edit.json.gz", {}, True, 400, 0),
        ("conflictedit", "conflict_composite_edit.json.gz", {}, True, 400, 0),
        ("hallueditbench", "hallueditbench_gemma_1.1_2b_it_art_sculpture.csv.gz", {}, True, 100, 0),
        ("hallueditbench", "hallueditbench_gemma_1.1_2b_it_business_brand.csv.gz", {}, True, 99, 0),
        ("canonical", "canonical/country_capital_fixed-val.jsonl.gz", {}, True, 113, 6),
        ("canonical", "canonical/pronoun_gender_bias_train-val.jsonl.gz", {}, True, 20, 0),
        ("canonical", "canonical/stereoset_train-val.jsonl.gz", {}, True, 1053, 0),
    ],
)
def test_the_original_files_are_read(
    name: str, file: str, options: dict[str, Any], needs_subject: bool, read: int, dropped: int, data_root: Path
) -> None:
    """As docs/benchmarks.md says."""
    loaded = datasets.load(name, data_root / file, options=options, needs_subject=needs_subject)
    assert (len(loaded.cases), len(loaded.dropped), loaded.unread) == (read, dropped, {})


# --- in a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_edited_and_scored_in_a_run(name: str, tmp_path: Path) -> None:
    path = written(name, RECORDS[name], tmp_path)
    folder = bench.run(BenchConfig.of(run_values(name, path, tmp_path)))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (results["counts"]["edits"], results["counts"]["failed"]) == (len(RECORDS[name]), 0)
    summary = results["summary"]
    groups = {
        f"{metric}/{probe.group}"
        for case in load(name, tmp_path, **RUNS.get(name, NO_OPTIONS)).cases
        for probe in case.probes
        for metric in ({"paraphrase": "generalization", "portability": "portability"}.get(probe.kind),)
        if metric and probe.group
    }
    assert groups <= set(summary["generation_containment"])
    assert all(
        entry["n"] >= 1 and entry["low"] <= entry["mean"] <= entry["high"] for entry in summary["generation"].values()
    )
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert all(group in page for group in groups)
    if name == "conflictedit":
        conflict = {"conflict_score", "conflict_magnitude", "tied_fact_damage"}
        assert conflict | {"round_success", "distortion", "ignore_rate", "failure_rate"} <= set(summary["probability"])
    if name == "hallueditbench":
        assert summary["generation"]["unrelated_unchanged"]["n"] == 1
    if name == "knowedit":
        publish.publish(tmp_path / "runs")
        html = (tmp_path / "runs" / "report" / "index.html").read_text(encoding="utf-8")
        assert "Portability: Reasoning" in html
        assert "n = 2" in html  # the table is over one case, as most of its cells are
        assert "nearest to how KnowEdit is scored" in html
        table = (tmp_path / "runs" / "report" / "table.md").read_text(encoding="utf-8")
        assert "Locality: Forgetfulness" in table
    if name == "mquake":
        assert {"hops", "portability/Multi_hop"} <= set(summary["generation"])


@pytest.mark.parametrize(
    ("low", "high", "written_as"),
    [(0.82, 1.0, "82–100"), (-0.12, 0.09, "-12 to 9"), (-0.001, 0.09, "0–9"), (-0.5, -0.2, "-50 to -20")],
)
def test_an_interval_with_a_negative_end_is_no_row_of_dashes(low: float, high: float, written_as: str) -> None:
    assert tables.between(low, high, "–") == written_as

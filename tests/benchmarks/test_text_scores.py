"""A run with every score of free texts: what its records and results hold, and what makes it another run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from errata.benchmarks.bench import prepare, run
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets.references import References, with_essence
from errata.benchmarks.runs.results import read_records, read_results
from errata.cli import overrides
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.request import EditRequest
from errata.evaluate.probes import Case, Probe

QUICK = [
    "editor=ft_m",
    "editor.num_steps=2",
    "dataset.shuffle=true",
    "n_edits=2",
    "generation.tokens=3",
    "collapse.n_texts=0",
    "collapse.known_facts=0",
]
ALL = [
    "wild.tokens=4",
    "wild.judge=judges_of_a_run:judge",
    "wild.trust_judge_code=true",
    "generation.fluency=papers",
    "generation.overlap=true",
    "dataset.references=world",
]


def config(*words: str, dataset: str = "world_counterfact") -> BenchConfig:
    return BenchConfig.of(compose("bench", overrides.translated([f"dataset={dataset}", *QUICK, *words], "bench")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    module = ModuleType("judges_of_a_run")
    vars(module)["judge"] = lambda claims: [claim.answers[0] in claim.text for claim in claims]
    sys.modules[module.__name__] = module
    try:
        return run(config(*ALL, f"out={tmp_path_factory.mktemp('runs')}"))
    finally:
        del sys.modules[module.__name__]


def test_every_score_of_free_texts_is_in_the_results(folder: Path) -> None:
    results = read_results(folder / "results.json")
    for scoring in ("wild", "wild_judged", "wild_f1", "bleu", "rouge_l"):
        assert results["summary"][scoring]["reliability"]["n"] == 2, scoring
        assert results["before"][scoring]["locality"]["n"] == 2, scoring
    assert results["summary"]["wild"]["locality_unchanged"]["n"] == 2
    assert results["summary"]["probability"]["essence_drift"]["n"] >= 1
    for moment in ("before", "after"):
        assert results["writing"][moment]["fluency"]["mean"] > 200
        assert 0 < results["writing"][moment]["consistency"]["mean"] < 100
    assert results["collapse"]["fluency_after"] is None  # of texts in another form
    assert results["judge"] == {"name": "judges_of_a_run:judge", "model": None, "trust_judge_code": True}
    assert any("judges_of_a_run:judge" in warning for warning in results["warnings"])
    assert results["evaluation"]["targets_with_stop_string"] == 0


def test_records_hold_the_texts_with_their_scores(folder: Path) -> None:
    probes = [probe for record in read_records(folder / "records.jsonl") for probe in record["probes"]]
    for probe in probes:
        said = probe["after"]
        if probe["kind"] == "rewrite":
            assert set(said["measured"]) == {"wild_judged", "bleu", "rouge_l"}
            assert said["measured"]["wild_judged"] == float(probe["target"] in said["wild"])
        assert (said["wild"] is None) is (probe["kind"] in ("generation", "essence"))
    claims = [line for line in (folder / "verdicts.jsonl").read_text().splitlines() if line]
    assert 0 < len(claims) <= 2 * len(probes)


def test_what_is_asked_more_makes_another_run_and_defaults_make_none(tmp_path: Path) -> None:
    plain = prepare(config(f"out={tmp_path}"))
    same = prepare(config(f"out={tmp_path}", "wild.tokens=0", "generation.fluency=greedy"))
    assert "wild" not in plain.settings["config"]
    assert plain.folder == same.folder
    for word in ("wild.tokens=4", "generation.fluency=papers", "generation.overlap=true", "dataset.references=world"):
        assert prepare(config(f"out={tmp_path}", word)).folder != plain.folder, word


def test_code_of_a_judge_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="trust_judge_code"):
        prepare(config("wild.tokens=4", "wild.judge=some_module:judge"))


# --- reference texts --------------------------------------------------------------------------------------------------

SNIPPETS = {"P1": {"Q1": [{"name": "Ada", "text": "Ada builds boats"}, {"name": "Bo", "text": "Bo rows"}]}}


def test_reference_texts_are_found_by_answer_and_by_subject(tmp_path: Path) -> None:
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(SNIPPETS))
    found = References.read(str(path))
    assert found.about_answer(("P1", "Q1")) == "Ada builds boats Bo rows"
    assert found.about_answer(("P1", "Q2")) == found.about_answer(None) == ""
    case = Case("1", EditRequest("{} likes", "Ada", "tea"), (), reference=("P1", "Q1"))
    assert with_essence(case, found).probes == (Probe("essence", "Ada", "builds boats"),)
    assert "reference" not in case.as_dict()


def test_the_authors_weights_beside_the_file_are_used(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "snippets.json").write_text(json.dumps(SNIPPETS))
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"boats": 1, "rows": 0}))
    np.save(tmp_path / "idf.npy", np.array([[2.0, 3.0]]))
    assert References.read(str(tmp_path / "snippets.json")).tf_idf.idf == {"boats": 3.0, "rows": 2.0}


@pytest.mark.parametrize("content", [[], {"P1": []}, {"P1": {"Q1": [{"name": "Ada"}]}}])
def test_references_of_another_form_are_refused(content: Any, tmp_path: Path) -> None:
    (tmp_path / "snippets.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="attribute_snippets"):
        References.read(str(tmp_path / "snippets.json"))


def test_records_without_a_relation_have_no_texts_about_their_subjects() -> None:
    found = prepare(config("dataset.references=world", dataset="world_zsre"))
    assert {probe.kind for case in found.cases for probe in case.probes} == {"rewrite", "paraphrase", "neighborhood"}

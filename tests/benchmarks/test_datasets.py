"""Every record of a dataset becomes a case or is named among the dropped; every bad file is an error that says why."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_records import COUNTERFACT, EASYEDIT, ZSRE, changed, written

from errata.benchmarks.datasets import counterfact, easyedit, world, zsre
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Dropped, Loaded, RecordReader
from errata.benchmarks.datasets.selection import without_conflicts
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate.probes import Probe

# --- what a good record means ---------------------------------------------------------------------------------------


def test_a_counterfact_record_becomes_probes_from_the_edited_models_point_of_view(tmp_path: Path) -> None:
    (case,) = counterfact.load(written(tmp_path, [COUNTERFACT])).cases
    assert (case.id, case.request.id, case.request.text) == ("7", "7", "The capital of Varland is")
    assert (case.request.target, case.request.target_true) == ("Brast", "Oslen")
    assert case.probes == (
        Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
        Probe("paraphrase", "Varland is governed from", "Brast", "Oslen"),
        Probe("neighborhood", "The capital of Tarvos {0} is", "Oslen", "Brast"),
        Probe("neighborhood", "The seat of the Moren duchy is", "Oslen", "Brast"),
        Probe("attribute", "The capital of Quelm is", "Brast", "Oslen"),
        Probe("generation", "Varland's largest city is"),
    )


def test_counterfact_plus_states_the_edit_before_every_neighbor_and_leaves_braces_alone(tmp_path: Path) -> None:
    (case,) = counterfact.load(written(tmp_path, [COUNTERFACT]), form="counterfact_plus").cases
    assert [probe for probe in case.probes if probe.kind == "distracting_neighborhood"] == [
        Probe(
            "distracting_neighborhood",
            "The capital of Varland is Brast. The capital of Tarvos {0} is",
            "Oslen",
            "Brast",
        ),
        Probe(
            "distracting_neighborhood",
            "The capital of Varland is Brast. The seat of the Moren duchy is",
            "Oslen",
            "Brast",
        ),
    ]


def test_a_zsre_record_teaches_the_first_right_answer(tmp_path: Path) -> None:
    (case,) = zsre.load(written(tmp_path, [ZSRE])).cases
    assert (case.id, case.request.text, case.request.subject_span) == ("0", "What is the capital of Varland?", (23, 30))
    assert case.probes == (
        Probe("rewrite", "What is the capital of Varland?", "Oslen"),
        Probe("paraphrase", "Which city governs Varland?", "Oslen"),
        Probe("neighborhood", "nq question: who plays the lyre?", "Ilda Moren"),
    )


def test_a_zsre_record_can_teach_the_alternative_answer_against_the_right_one(tmp_path: Path) -> None:
    (case,) = zsre.load(written(tmp_path, [ZSRE]), target="alt").cases
    assert (case.request.target, case.request.target_true) == ("Brast", "Oslen")
    assert case.probes[1] == Probe("paraphrase", "Which city governs Varland?", "Brast", "Oslen")


def test_an_easyedit_record_becomes_the_same_probes_as_counterfacts(tmp_path: Path) -> None:
    (case,) = easyedit.load(written(tmp_path, [EASYEDIT])).cases
    assert case.probes == (
        Probe("rewrite", "The capital of Varland is", "Brast", "Oslen"),
        Probe("paraphrase", "Varland is governed from", "Brast", "Oslen"),
        Probe("neighborhood", "The capital of Tarvos is", "Oslen", "Brast"),
    )


def test_qaedit_s_locality_and_target_are_read(tmp_path: Path) -> None:
    record = {
        "id": 4,
        "source": "NQ",
        "prompt": "who is the mayor of Varland?",
        "subject": "mayor of Varland",
        "target": "Oslen",
        "rephrase": "Who leads Varland as its mayor?",
        "locality": [{"loc": "who protects Tarvos", "loc_ans": "Brast"}, {"loc": "what is 1 + 1", "loc_ans": "2"}],
    }
    (tmp_path / "x.json").write_text(json.dumps([record]))
    loaded = datasets.load("easyedit", tmp_path / "x.json")
    assert loaded.cases[0].request.target == "Oslen"
    asked = [(probe.prompt, probe.target) for probe in loaded.cases[0].probes if probe.kind == "neighborhood"]
    assert asked == [("who protects Tarvos", "Brast"), ("what is 1 + 1", "2")]
    record["locality"][0] = {"loc": "who protects Tarvos"}
    (tmp_path / "x.json").write_text(json.dumps([record, record | {"locality": []}]))
    (dropped,) = datasets.load("easyedit", tmp_path / "x.json").dropped
    assert dropped.field == "locality[0]"


def test_nested_locality_and_portability_are_read_in_both_their_forms(tmp_path: Path) -> None:
    record = {
        **changed(EASYEDIT, "locality_prompt", ...),
        "ground_truth": [["Oslen", "Oslen City"]],
        "locality": {
            "Relation_Specificity": [{"prompt": "Varland lies in", "ground_truth": [["the north", "northland"]]}],
            "neighborhood": {"prompt": ["The capital of Tarvos is", "2 + 2 is"], "ground_truth": ["Oslen", ["4"]]},
        },
        "portability": {"Reasoning": [{"prompt": "Varland's mayor lives in", "ground_truth": "Brast"}]},
    }
    del record["locality_ground_truth"]
    (case,) = easyedit.load(written(tmp_path, [record])).cases
    assert case.probes[2:] == (
        Probe("neighborhood", "Varland lies in", "the north"),
        Probe("neighborhood", "The capital of Tarvos is", "Oslen", "Brast"),
        Probe("neighborhood", "2 + 2 is", "4"),
        Probe("portability", "Varland's mayor lives in", "Brast"),
    )


# --- taking a part --------------------------------------------------------------------------------------------------


def numbered(tmp_path: Path, n: int = 20) -> Path:
    return written(tmp_path, [{**COUNTERFACT, "case_id": i} for i in range(n)])


def ids_of(loaded: Loaded) -> list[str]:
    return [case.id for case in loaded.cases]


def test_without_a_seed_the_order_is_the_files(tmp_path: Path) -> None:
    assert ids_of(counterfact.load(numbered(tmp_path), limit=3)) == ["0", "1", "2"]


def test_a_seed_draws_the_same_cases_again_and_another_seed_others(tmp_path: Path) -> None:
    path = numbered(tmp_path)
    first = ids_of(counterfact.load(path, limit=10, seed=1))
    assert first == ids_of(counterfact.load(path, limit=10, seed=1))
    assert first != ids_of(counterfact.load(path, limit=10, seed=2))
    assert first[:5] == ids_of(counterfact.load(path, limit=5, seed=1))


@pytest.mark.parametrize("content", [[3, "5", 99], {"known_case_ids": [3, 5, 99]}])
def test_ids_pick_cases_and_those_not_there_are_named(content: Any, tmp_path: Path) -> None:
    ids = written(tmp_path, content, "ids.json")
    for given_ids in (ids, str(ids), [3, 5, 99]):
        loaded = counterfact.load(numbered(tmp_path), ids=given_ids)
        assert ids_of(loaded) == ["3", "5"]
        assert loaded.dropped == [Dropped("99", "ids", "asked for by id, but not in the file")]


def test_a_file_of_ids_that_holds_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="known_case_ids"):
        counterfact.load(numbered(tmp_path), ids=written(tmp_path, {"ids": [1]}, "ids.json"))
    with pytest.raises(DatasetError, match="no usable record"):
        counterfact.load(numbered(tmp_path), ids=["absent"])


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_that_is_no_positive_number_is_refused(limit: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        counterfact.load(numbered(tmp_path), limit=limit)


def test_of_cases_that_edit_the_same_prompt_the_first_is_kept(tmp_path: Path) -> None:
    loaded = without_conflicts(counterfact.load(numbered(tmp_path, 3)))
    assert ids_of(loaded) == ["0"]
    assert [entry.record for entry in loaded.dropped] == ["1", "2"]


# --- by name --------------------------------------------------------------------------------------------------------


def test_datasets_are_loaded_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, [COUNTERFACT])
    plus = datasets.load("counterfact_plus", path)
    assert plus == counterfact.load(path, form="counterfact_plus")
    assert datasets.load("counterfact", path) == counterfact.load(path)
    questions = written(tmp_path, [ZSRE], "zsre.json")
    assert datasets.load("zsre", questions, target="alt") == zsre.load(questions, target="alt")
    flat = written(tmp_path, [EASYEDIT], "flat.json")
    assert datasets.load("easyedit", flat) == easyedit.load(flat)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("counterfact", "download https://rome.baulab.info/data/dsets/counterfact.json and give dataset.path=FILE"),
        ("counterfact_plus", "download https://rome.baulab.info/data/dsets/counterfact.json and give dataset.path="),
        ("zsre", "download https://rome.baulab.info/data/dsets/zsre_mend_eval.json and give dataset.path=FILE"),
        ("easyedit", "a file in EasyEdit's flat form; give dataset.path=FILE"),
    ],
)
def test_a_real_dataset_without_its_file_says_where_it_is_to_be_had(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        datasets.load(name)


def test_the_testbed_has_its_facts_in_each_schema_under_names_of_its_own() -> None:
    for form in ("counterfact", "counterfact_plus", "zsre"):
        assert datasets.load(f"world_{form}").cases == world.cases(form=form)
    assert datasets.load("world").cases == world.cases()
    assert {name.split("_")[0] for name in datasets.TESTBEDS} == {"world"}


def test_an_unknown_dataset_is_answered_with_the_closest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'counterfact'"):
        datasets.load("conterfact", tmp_path)
    with pytest.raises(ConfigError, match="counterfact_plus"):
        counterfact.load(written(tmp_path, [COUNTERFACT]), form="plus")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="answers"):
        zsre.load(written(tmp_path, [ZSRE]), target="answer")  # type: ignore[arg-type]


def test_a_folder_that_is_no_testbed_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder as"):
        datasets.load("world", tmp_path)
    with pytest.raises(ConfigError, match=r"dataset\.path is missing"):
        datasets.load("easyedit")


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_of_counterfact(data_root: Path) -> Loaded:
    return counterfact.load(data_root / "counterfact.json.gz", form="counterfact_plus")


def test_all_of_counterfact_loads_with_nothing_dropped(all_of_counterfact: Loaded) -> None:
    loaded = all_of_counterfact
    assert (len(loaded.cases), loaded.dropped) == (19_727, [])
    kinds = Counter(probe.kind for case in loaded.cases for probe in case.probes)
    assert kinds["rewrite"] == 19_727
    assert kinds["neighborhood"] == kinds["distracting_neighborhood"]
    assert len(without_conflicts(loaded).dropped) == 278


def test_all_of_zsre_loads_and_blank_alternatives_are_named(data_root: Path) -> None:
    loaded = zsre.load(data_root / "zsre_mend.json.gz")
    assert (len(loaded.cases), loaded.dropped) == (800, [])
    other = zsre.load(data_root / "zsre_mend.json.gz", target="alt")
    assert len(other.cases) + len(other.dropped) == 800
    assert Counter(entry.field for entry in other.dropped) == {"alt": 2, "target_true": 16}


def test_easyedits_records_are_counterfacts(data_root: Path, all_of_counterfact: Loaded) -> None:
    flat = easyedit.load(data_root / "counterfact-easyedit.json.gz")
    assert (len(flat.cases), flat.dropped) == (2_000, [])
    original = {case.id: case for case in all_of_counterfact.cases}
    for case in flat.cases[:200]:
        theirs = original[case.id]
        assert case.request.text == theirs.request.text
        assert set(case.probes) <= set(theirs.probes)


def test_a_field_is_read_by_its_path() -> None:
    record = RecordReader({"a": {"b": " text "}}, "#0")
    assert record.text("a.b") == " text "
    assert record.get("a.c") is None
